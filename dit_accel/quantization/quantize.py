"""Quantize: the weights of every denoiser of a pipeline in memory become codes, and come back.

Data-free, or calibrated on runs of the pipeline itself: Hessian feedback, then VQ4DiT or PV-Tuning block by block, then
a tuning of the whole model. `quantize` pushes the inverse of all it does on an undo stack, last first.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_accel.denoiser.find import find_denoisers
from dit_accel.diffusers_bridge import is_pipeline, weights_kept_away
from dit_accel.errors import UnsupportedModelError
from dit_accel.quantization.allocate import allocate
from dit_accel.quantization.calibrate import Progress, encode_all, feedback_all, shared_books
from dit_accel.quantization.collect import collect_calls
from dit_accel.quantization.distill import distill
from dit_accel.quantization.install import add_codebooks, coded_like, put, put_back, remove_codebooks
from dit_accel.quantization.keep import Kept, fingerprint
from dit_accel.quantization.mark import mark_quantised, unmark
from dit_accel.quantization.plan import plan
from dit_accel.quantization.refine import refine_blocks
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.linear import VQEmbedding, VQLinear
from dit_accel.weights.storage import Stored
from dit_accel.weights.vector_quant import VectorQuant


@dataclass
class Quantized:
    """What was done to one denoiser. formats: of the layers. dense_bytes, coded_bytes: of those layers; rest_bytes: of
    all else in the model. errors: relative squared error of each weight. seconds: of it all."""

    formats: dict[str, LayerFormat]
    dense_bytes: int = 0
    coded_bytes: int = 0
    rest_bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits of all that is stored of the quantised layers, for each weight in them."""
        return 8 * self.coded_bytes / sum(made.shape[0] * made.shape[1] for made in self.formats.values())

    @property
    def before(self) -> int:
        """Bytes of the dense model."""
        return self.dense_bytes + self.rest_bytes

    @property
    def after(self) -> int:
        """Bytes of the quantised model."""
        return self.coded_bytes + self.rest_bytes

    @property
    def ratio(self) -> float:
        """How many times smaller the model is."""
        return self.before / self.after

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        data = asdict(self) | {"bits_per_weight": self.bits_per_weight, "ratio": self.ratio}
        return data | {"formats": {name: made.to_dict() for name, made in self.formats.items()}}


def check(target: Any, settings: VectorQuant) -> dict[str, dict[str, LayerFormat]]:
    """Denoiser -> formats of the layers that would be quantised, or the error that says why not; changes nothing."""
    denoisers = find_denoisers(target)
    if settings.is_calibrated and not is_pipeline(target):
        raise UnsupportedModelError(
            f"The method {settings.method!r} (or tuning) looks at runs of a pipeline, and got {type(target).__name__}; "
            "give the pipeline, or the method 'data-free' without tuning."
        )
    for name, module in denoisers.items():
        if any(isinstance(layer, (VQLinear, VQEmbedding)) for layer in module.modules()):
            raise UnsupportedModelError(f"{name} is quantised already; call dequantize() on it first.")
        if getattr(module, "is_quantized", False):
            raise UnsupportedModelError(f"{name} is quantised by another method; load it dense.")
        check_at_hand(name, module)
    return {name: plan(module, settings) for name, module in denoisers.items()}


def check_at_hand(name: str, module: nn.Module) -> None:
    """Raise UnsupportedModelError where something else keeps the weights in a way that codes do not survive."""
    reason = weights_kept_away(module)
    if reason is not None:
        raise UnsupportedModelError(f"The weights of {name} cannot be quantised: they {reason}.")


def quantize(
    target: Any,
    settings: VectorQuant,
    undo: contextlib.ExitStack,
    *,
    arguments: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Quantized]:
    """Quantise every denoiser of `target` in place -> what was done to each, by name.

    undo: gets the inverse of every change. arguments: of the pipeline's calls while calibrating. folder: where results
    are kept, so that an interrupted calibration goes on; deterministic either way. progress: (what, done, in all).
    """
    planned, told = check(target, settings), progress or (lambda what, done, total: None)
    denoisers = find_denoisers(target)
    for name, module in denoisers.items():
        if any(parameter.is_meta for parameter in module.parameters()):  # to plan, as `explain` does, they need not be
            raise UnsupportedModelError(
                f"The weights of {name} are offloaded by accelerate, so there is nothing to read; apply the policy "
                "before offloading."
            )
    calls: Mapping[str, Any] = dict.fromkeys(denoisers, ())
    if settings.is_calibrated:
        calls = collect_calls(
            target, denoisers, settings.calibrate, arguments=arguments, seed=settings.seed,
            progress=lambda done, total: told("runs of the dense pipeline", done, total),
        )  # fmt: skip
    made: dict[str, Quantized] = {}
    for name, module in denoisers.items():
        started = time.perf_counter()
        if settings.mean_bits is not None:
            planned[name] = allocate(module, planned[name], calls[name], settings, told)
        kept = _kept(None if folder is None else folder / name, module, planned[name], settings, arguments)
        job = _Job(module, planned[name], settings, kept, told, undo)
        made[name] = job.run(calls[name])
        made[name].seconds = time.perf_counter() - started
    return made


def _kept(
    folder: Path | None,
    module: nn.Module,
    formats: Mapping[str, LayerFormat],
    settings: VectorQuant,
    arguments: Mapping[str, Any] | None,
) -> Kept:
    if folder is None:
        return Kept(None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    described = {name: made.to_dict() for name, made in formats.items()}
    model = fingerprint(module.state_dict())
    said = {key: repr(value) for key, value in (arguments or {}).items()}
    return Kept(folder, {"model": model, "settings": settings.to_dict(), "layers": described, "arguments": said})


class _Job:
    """One denoiser on its way from dense to coded."""

    def __init__(
        self,
        module: nn.Module,
        formats: dict[str, LayerFormat],
        settings: VectorQuant,
        kept: Kept,
        progress: Progress,
        undo: contextlib.ExitStack,
    ):
        self.module, self.formats, self.settings = module, formats, settings
        self.kept, self.progress, self.undo = kept, progress, undo
        self.layers = {name: module.get_submodule(name) for name in formats}
        self.result = Quantized(formats)
        first: Any = next(iter(self.layers.values()))
        self.dtype: torch.dtype = first.weight.dtype

    def run(self, calls: Any) -> Quantized:
        whole = sum(value.numel() * value.element_size() for value in self.module.state_dict().values())
        self.result.dense_bytes = sum(_bytes_of(layer) for layer in self.layers.values())
        self.result.rest_bytes = whole - self.result.dense_bytes
        books = shared_books(self.layers, self.formats, self.settings)
        if self.settings.is_calibrated:
            calibrated, books = self._calibrated(books, calls)
            found = iter(calibrated.items())
        else:  # found one by one, as each dense weight may go before the next is looked at
            found = encode_all(self.layers, self.formats, books, self.settings, self.kept, self.progress)
        holder = self._add_books(books)
        for name, stored in found:
            self._install(name, stored, holder)
        mark_quantised(self.module, self.settings, self.formats)
        self.undo.callback(unmark, self.module)
        return self.result

    def _calibrated(self, books: dict[str, Tensor], calls: Any) -> tuple[dict[str, Stored], dict[str, Tensor]]:
        """Codes of all layers, and the shared codebooks; the model is dense and as it was, its tuned rest aside."""
        before = {name: layer.weight for name, layer in self.layers.items()}
        method, arguments = self.settings.method, (self.settings, self.kept, self.progress)
        try:
            if method in ("feedback", "pv-tuning"):
                found = feedback_all(self.module, self.formats, calls, books, *arguments)
            else:
                found = dict(encode_all(self.layers, self.formats, books, *arguments))
        finally:
            for name, layer in self.layers.items():
                layer.weight = before[name]  # the very Parameter
        if method in ("vq4dit", "pv-tuning"):
            found = refine_blocks(self.module, self.formats, found, calls, *arguments)
        if self.settings.calibrate.tuning:
            found, books = distill(self.module, self.formats, found, books, calls, *arguments, self.undo)
        return found, books

    def _add_books(self, books: Mapping[str, Tensor]) -> Any:
        first: Any = next(iter(self.layers.values()))
        holder = add_codebooks(self.module, self.formats, values=books, device=first.weight.device, dtype=self.dtype)
        self.undo.callback(remove_codebooks, self.module)
        return holder

    def _install(self, name: str, stored: Stored, holder: Any) -> None:
        """Put a coded layer in the place of a dense one, whose weight then waits where the settings say."""
        dense: Any = self.layers[name]
        weight = dense.weight.detach()
        error = float(
            (stored.decode() - weight.float()).square().sum() / weight.float().square().sum().clamp(min=1e-30)
        )
        coded = coded_like(dense, self.formats[name], holder, scratch_mb=self.settings.scratch_mb)
        coded.load(stored)
        put(self.module, name, coded)
        self.undo.callback(put_back, self.module, name, dense)
        self.result.errors[name] = error
        self.result.coded_bytes += sum(
            value.numel() * value.element_size() for key, value in coded.named_buffers(recurse=False)
        )
        self._put_away(dense.weight, coded)

    def _put_away(self, weight: nn.Parameter, coded: nn.Module) -> None:
        """Take the dense weight out of the way, and bring it back, to where the layer is by then, on undo."""
        if self.settings.keep == "memory":
            if weight.device.type == "cpu":
                return
            weight.data = weight.data.cpu()
            self.undo.callback(_bring_back, weight, lambda: weight.data, coded)
            return
        folder = tempfile.TemporaryDirectory(prefix="dit_accel-dense-")
        path = Path(folder.name) / "weight.safetensors"
        save_file({"weight": weight.data.contiguous()}, path)
        weight.data = torch.empty(0, dtype=weight.dtype)
        self.undo.callback(folder.cleanup)
        self.undo.callback(_bring_back, weight, lambda: load_file(path)["weight"], coded)


def _bring_back(weight: nn.Parameter, value: Any, coded: nn.Module) -> None:
    weight.data = value().to(next(coded.buffers()).device)


def _bytes_of(layer: nn.Module) -> int:
    weight: Any = layer.weight
    return weight.numel() * weight.element_size()
