"""The plug-in of diffusers: quantises while a model is loaded, loads models that are quantised, and takes it back.

The loader of diffusers walks over the tensors of a file and asks the quantizer about each. Dense layers therefore stay
in place until their weight comes by, and are swapped then, so that one dense weight at a time is in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from dit_accel.diffusers_bridge import answer_for_weights, model_being_loaded
from dit_accel.errors import ArgumentError, CheckpointError, UnsupportedModelError
from dit_accel.quantization.checkpoint import FLOATS, Contents, check_complete, check_entries, expected
from dit_accel.quantization.config import VQConfig, VQMethod
from dit_accel.quantization.headers import Entry, entries_of, read_header
from dit_accel.quantization.install import BOOKS, add_codebooks, coded_like, encode_layer, put
from dit_accel.quantization.mark import densify, unmark
from dit_accel.quantization.plan import plan
from dit_accel.weights.codebook import universal
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.linear import SharedCodebooks, VQEmbedding, VQLinear


class VQQuantizer(DiffusersQuantizer):
    """Made by diffusers for each model that is loaded with a VQConfig, or that has one in its config.json."""

    use_keep_in_fp32_modules = True  # the loader then keeps time embedders and norms in float32, as for dense models

    def __init__(self, quantization_config: VQConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: VQConfig = copy.copy(quantization_config)  # layers are filled; the user's one stays
        self._entries: dict[str, Entry] = {}
        self._formats: dict[str, LayerFormat] = {}
        self._left: set[str] = set()  # layers whose weight has not come by yet
        self._books: SharedCodebooks | None = None

    # ------------------------------------------------------------------------------------------- before files are read

    def validate_environment(self, *args: Any, torch_dtype: Any = None, device_map: Any = None, **kwargs: Any) -> None:
        """Raise for what cannot be loaded, as early as it is known. Called before and after the files are opened."""
        del args, kwargs
        if not hasattr(DiffusersQuantizer, "maybe_update_state_dict"):
            raise UnsupportedModelError(
                f"diffusers {diffusers.__version__} does not let quantizers look at the files that it loads and saves; "
                "a VQConfig needs diffusers 0.39 or newer; Policy(weights=VectorQuant(...)) quantises in memory."
            )
        if torch_dtype is not None and torch_dtype not in FLOATS:
            raise ArgumentError(f"The dtype is {torch_dtype}; quantised weights load as bfloat16, float16 or float32.")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ArgumentError(
                "The device_map puts layers on disk, where quantised ones cannot be; give them a device."
            )
        if not self.pre_quantized:
            self.quantization_config.check_data_free()
            return
        expected(self.quantization_config)
        found = None if self._entries else model_being_loaded()
        if found is not None:
            self._take(found["folder"], found["variant"], safetensors=found["safetensors"])

    def _take(self, folder: Path, variant: str | None, *, safetensors: bool) -> None:
        if not safetensors:
            raise CheckpointError(
                f"{folder} is quantised, and only its safetensors files are read; set use_safetensors."
            )
        entries = entries_of(folder, variant)
        check_entries(self.quantization_config, entries)
        self._entries = entries

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Look at the headers of the files; the keys stay as they are."""
        files = [Path(file) for file in checkpoint_files]
        odd = [file.name for file in files if file.suffix != ".safetensors"]
        if self.pre_quantized and odd:
            raise CheckpointError(f"The weights are quantised and lie in {odd[0]}; only safetensors files are read.")
        if not odd:
            self._entries = {name: entry for file in files for name, entry in read_header(file).items()}
        if self.pre_quantized:
            check_entries(self.quantization_config, self._entries)
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, to be read one at a time and looked at."""
        contents = Contents(self.quantization_config) if self.pre_quantized else None
        return _Streamed(state_dict, self._entries, contents) if self._entries else state_dict

    @property
    def supports_parallel_loading(self) -> bool:
        return self.pre_quantized  # layers that are swapped are not safe to be looked up by another thread

    # ------------------------------------------------------------------------------------------------- around a loading

    def _process_model_before_weight_loading(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        """Decide which layers are quantised. Those of a quantised checkpoint are put in place now, empty."""
        del kwargs
        if self.pre_quantized:
            self._formats = dict(self.quantization_config.layers or {})
            _check_layers(model, self._formats)
        else:
            kept = set(keep_in_fp32_modules or ())
            found = plan(model, self.quantization_config.settings)
            self._formats = {name: made for name, made in found.items() if not kept & set(name.split("."))}
            if not self._formats:
                raise UnsupportedModelError(
                    f"All layers of {type(model).__name__} that could be quantised are among those that it keeps in "
                    f"float32 ({', '.join(sorted(kept))}); load it without a VQConfig."
                )
        first: Any = model.get_submodule(next(iter(self._formats)))
        device = "meta" if self.pre_quantized else None
        self._books = add_codebooks(model, self._formats, device=device, dtype=first.weight.dtype)
        self._left = set() if self.pre_quantized else set(self._formats)
        if self.pre_quantized:
            for name in self._formats:
                put(model, name, self._empty(model, name))
        return model

    def _empty(self, model: nn.Module, name: str) -> VQLinear | VQEmbedding:
        scratch = self.quantization_config.scratch_mb
        return coded_like(model.get_submodule(name), self._formats[name], self._books, scratch_mb=scratch)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Raise where the files lack what they should have; diffusers would warn and leave memory as it was."""
        del model, prefix
        if self.pre_quantized:
            check_complete(missing_keys)
        lost = sorted({key for key in missing_keys if key.removesuffix(".weight") in self._formats})
        if lost:
            raise CheckpointError(f"The checkpoint lacks the tensor {lost[0]}, which is to be quantised; get it again.")
        return [key for key in missing_keys if not key.startswith(f"{BOOKS}.")]

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Any, **kwargs: Any
    ) -> bool:
        """True for dense weights that are to be quantised."""
        del model, param_value, state_dict, kwargs
        return param_name.removesuffix(".weight") in self._left and param_name.endswith(".weight")

    def create_quantized_param(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Quantise the weight that came by, and put a quantised layer in the place of the dense one."""
        del args, kwargs
        name = param_name.removesuffix(".weight")
        format, made = self._formats[name], self._empty(model, name)
        book = universal(format.codebook) if format.source == "shared" else None
        try:
            stored = encode_layer(name, param_value.to(target_device), format, self.quantization_config.seed, book)
        except CheckpointError as error:
            raise CheckpointError(f"The layer {name} cannot be quantised. {error}") from None
        made.load(stored)
        put(model, name, made)
        self._left.remove(name)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        if self._left:
            raise UnsupportedModelError(
                f"The weight of {sorted(self._left)[0]} never came by, so the model is not quantised; load it without "
                "offload_state_dict and without offloading to disk."
            )
        self.quantization_config.layers = self._formats
        model.register_to_config(quantization_config=self.quantization_config)
        answer_for_weights(model)
        self._entries, self._books = {}, None
        return model

    # --------------------------------------------------------------------------------------------- save, and take back

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is saved; raises where it could not be loaded again."""
        if not safe_serialization:
            raise ArgumentError("Quantised weights are saved as safetensors only; leave safe_serialization at True.")
        lost = sorted(set(expected(self.quantization_config)) - set(state_dict))
        if lost:
            raise UnsupportedModelError(
                f"The model has no {lost[0]}, so what is saved could not be loaded; unload LoRAs before saving."
            )
        floats = {name for name, (_, holds_bytes) in expected(self.quantization_config).items() if not holds_bytes}
        return {name: _small(value) if name in floats else value for name, value in state_dict.items()}, {}

    def _dequantize(self, model: Any) -> Any:
        """Plain dense layers, and a config without a trace."""
        densify(model)
        unmark(model)
        model.hf_quantizer = self  # the caller deletes it
        return model

    @property
    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _small(value: Tensor) -> Tensor:
    """Scales and codebooks as they were made, at bfloat16, where nothing is lost: a float32 model is saved as small."""
    half = value.to(torch.bfloat16)
    return half if torch.equal(half.to(value.dtype), value) else value


class _Streamed(dict[str, Tensor]):
    """The mapped tensors of a file; the loader's walk over them reads each when its turn comes.

    Pages of a memory map that were looked at stay resident until the last tensor of the file goes, which for a bias in
    the model is never. Reading them costs one tensor of memory at a time.
    """

    def __init__(self, mapped: Mapping[str, Tensor], entries: Mapping[str, Entry], contents: Contents | None):
        super().__init__(mapped)
        self._entries, self._contents = entries, contents

    def items(self) -> Any:
        return ((name, self._value(name)) for name in self)

    def _value(self, name: str) -> Tensor:
        mapped, entry = self[name], self._entries.get(name)
        same = entry is not None and entry.dtype == mapped.dtype and entry.shape == mapped.shape
        value = entry.read() if entry is not None and same else mapped
        if self._contents is not None and self._contents.knows(name):
            self._contents.check(name, [value])
        return value


def _check_layers(model: nn.Module, formats: Mapping[str, LayerFormat]) -> None:
    """Raise CheckpointError unless the model has a dense layer of the right kind and shape for each format."""
    for name, format in formats.items():
        try:
            layer: Any = model.get_submodule(name)
        except AttributeError:
            layer = None
        kind = nn.Embedding if format.kind == "embedding" else nn.Linear
        if type(layer) is not kind or tuple(layer.weight.shape) != format.shape:
            there = "no such layer" if layer is None else f"{layer} there"
            raise CheckpointError(
                f"By its config.json the checkpoint has quantised {name}, {format.kind} of shape {list(format.shape)}, "
                f"and {type(model).__name__} has {there}; the two do not belong together."
            )
        if format.kind == "linear" and (layer.bias is not None) != format.bias:
            raise CheckpointError(f"config.json and {type(model).__name__} disagree whether {name} has a bias.")


def register() -> None:
    """Make the format known to diffusers, which has no other way for it to be found; once or often.

    And to transformers by its config alone: a PipelineQuantizationConfig takes a `quant_backend` that both know.
    """
    from transformers.quantizers import auto

    AUTO_QUANTIZER_MAPPING[VQMethod.VECTOR_QUANT.value] = VQQuantizer
    for known in (AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        known[VQMethod.VECTOR_QUANT.value] = VQConfig  # pyright: ignore[reportArgumentType]
