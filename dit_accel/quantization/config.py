"""VQConfig: vector-quantised weights as a quantization config of diffusers, and what config.json keeps of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from dit_accel.errors import CheckpointError, PolicyError, shown
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.vector_quant import VectorQuant

VERSION = 1  # of the format, in config.json


class VQMethod(StrEnum):
    """The name of this format among the quantization methods of diffusers; it reads `.value`, so an Enum it must be."""

    VECTOR_QUANT = "dit_accel_vq"


class VQConfig(QuantizationConfigMixin):
    """How the linear layers inside the blocks of a diffusers transformer are stored: as codes of a codebook.

        FluxTransformer2DModel.from_pretrained(folder, quantization_config=VQConfig(bits=2), torch_dtype=torch.bfloat16)

    Quantises while loading, without looking at data. Settings are those of `dit_accel.VectorQuant`, by the same names;
    modules_to_not_convert is its `dense`: parts of the names of layers that stay dense. layers: name -> format of each
    quantised layer; filled by quantising, and kept in config.json. method: how the codes were found; others than
    "data-free", and a codebook of "model", need the whole pipeline, and can be loaded here but not made.

    Raises PolicyError for a setting that is not allowed.
    """

    def __init__(
        self,
        bits: int = 2,
        modulation_bits: int = 4,
        codebook: str = "universal",
        size: str | None = None,
        rotate: bool = True,
        low_rank: int = 0,
        keep_first: int = 0,
        keep_last: int = 0,
        modules_to_not_convert: Sequence[str] | str | None = None,
        smallest: int = 4096,
        scratch_mb: float = 32.0,
        seed: int = 0,
        method: str = "data-free",
        format_version: int = VERSION,
        layers: Mapping[str, LayerFormat | Mapping[str, Any]] | None = None,
    ):
        if type(format_version) is not int or format_version != VERSION:
            raise CheckpointError(
                f"The weights are of format_version {shown(format_version)}, and this version of dit_accel reads "
                f"{VERSION}; install the version that wrote them."
            )
        self.quant_method = VQMethod.VECTOR_QUANT  # pyright: ignore[reportAttributeAccessIssue]
        self.bits, self.modulation_bits = bits, modulation_bits
        self.codebook, self.size, self.rotate, self.low_rank = codebook, size, rotate, low_rank
        self.keep_first, self.keep_last = keep_first, keep_last
        if isinstance(modules_to_not_convert, str):
            modules_to_not_convert = [modules_to_not_convert]
        self.modules_to_not_convert = modules_to_not_convert or []
        self.smallest, self.scratch_mb, self.seed = smallest, scratch_mb, seed
        self.method, self.format_version = method, format_version
        self.layers = None if layers is None else _formats(layers)
        self.modules_to_not_convert = list(self.settings.dense)

    @property
    def settings(self) -> VectorQuant:
        """The same as settings of a policy; checks every one."""
        same = {key: getattr(self, key) for key in _SETTINGS if key != "modules_to_not_convert"}
        kept = self.modules_to_not_convert
        return VectorQuant(**same, dense=tuple(kept) if isinstance(kept, list) else kept)  # pyright: ignore

    @staticmethod
    def of(settings: VectorQuant, layers: Mapping[str, LayerFormat]) -> VQConfig:
        """The config of a model that was quantised by these settings, in these formats."""
        same = {key: getattr(settings, key) for key in _SETTINGS if key != "modules_to_not_convert"}
        return VQConfig(**same, modules_to_not_convert=settings.dense, layers=layers)

    def check_data_free(self) -> None:
        """Raise PolicyError where a model cannot be quantised by this config while it is loaded."""
        if self.method != "data-free" or self.codebook == "model":
            given = f"codebook={self.codebook!r}" if self.method == "data-free" else f"method={self.method!r}"
            raise PolicyError(
                f"VQConfig has {given}, which needs the whole pipeline, not one layer at a time; use `dit-accel "
                "quantize`, or dit_accel.apply(pipe, Policy(weights=VectorQuant(...))), and save the result."
            )
        if self.layers is not None:
            raise PolicyError("VQConfig.layers is given, but the weights are dense; leave it out, quantising fills it.")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary of every field, as in config.json."""
        layers = None if self.layers is None else {name: made.to_dict() for name, made in self.layers.items()}
        same = {key: copy.deepcopy(getattr(self, key)) for key in (*_SETTINGS, "format_version")}
        return {"quant_method": self.quant_method.value, **same, "layers": layers}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and the method's name; the mixin's `to_json_string` asks for it."""
        defaults = VQConfig().to_dict()
        return {key: value for key, value in self.to_dict().items() if key == "quant_method" or value != defaults[key]}

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of `to_dict`; raises CheckpointError for anything that is not a config of this version.

        kwargs: settings in place of those of the dictionary; with return_unused_kwargs they come back beside the config
        where they are none.
        """
        if not isinstance(config_dict, Mapping):
            raise CheckpointError(f"The quantization config is {shown(config_dict)}; a mapping is expected.")
        data = dict(config_dict)
        method = data.pop("quant_method", VQMethod.VECTOR_QUANT)
        if method != VQMethod.VECTOR_QUANT:
            raise CheckpointError(
                f"The quant_method is {shown(method)}; VQConfig reads {VQMethod.VECTOR_QUANT.value!r}."
            )
        known = {*_SETTINGS, "format_version", "layers"}
        data |= {key: value for key, value in kwargs.items() if key in known}
        odd = sorted(str(key) for key in set(data) - known)
        if odd and type(data.get("format_version", VERSION)) is int and data.get("format_version", VERSION) == VERSION:
            raise CheckpointError(
                f"The quantization config has {shown(odd[0])}; format_version {VERSION}, which this version of "
                f"dit_accel reads, has {', '.join(sorted(known))}."
            )
        if odd:
            cls(format_version=data["format_version"])  # raises
        try:
            config = cls(**data)
        except PolicyError as error:
            raise CheckpointError(f"The quantization config is not one of this version: {error}") from None
        return (config, {k: v for k, v in kwargs.items() if k not in known}) if return_unused_kwargs else config

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VQConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        given = {key: value for key, value in self.to_diff_dict().items() if key not in ("quant_method", "layers")}
        layers = [] if self.layers is None else [f"{len(self.layers)} layers"]
        return f"VQConfig({', '.join([f'{key}={value!r}' for key, value in given.items()] + layers)})"


_SETTINGS = (
    "bits", "modulation_bits", "codebook", "size", "rotate", "low_rank", "keep_first", "keep_last",
    "modules_to_not_convert", "smallest", "scratch_mb", "seed", "method",
)  # fmt: skip


def _formats(layers: Any) -> dict[str, LayerFormat]:
    """The formats of layers by name, from objects or dictionaries."""
    if not isinstance(layers, Mapping) or not layers:
        raise CheckpointError(f"The layers are {shown(layers)}; a mapping of names to formats is expected.")
    found = {}
    for name, made in layers.items():
        parts = name.split(".") if isinstance(name, str) and len(name) <= 300 else [""]
        if not all(part.isidentifier() or part.isdecimal() for part in parts):
            raise CheckpointError(f"A quantised layer is called {shown(name)}; a dotted name is expected.")
        try:
            found[name] = made if isinstance(made, LayerFormat) else LayerFormat.from_dict(made)
        except CheckpointError as error:
            raise CheckpointError(f"The layer {name} cannot be read. {error}") from None
    return found
