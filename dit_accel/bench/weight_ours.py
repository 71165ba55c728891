"""Ours in the bench of weights: vector-quantised weights at 2, 3 and 4 bits, part by part and as a whole.

A part is a method that takes (pipe, hessians by layer) and returns by layer (dense float32 [O, I], bytes that it
stores). Bytes are those of `Stored.nbytes`: packed codes, bfloat16 row scales, packed signs of the rotation, the
layer's own codebook. A universal codebook belongs to the model and is left out: 2048, 256 and 1024 bytes for 2, 3 and
4 bits. WHOLE are settings as a user gives them, applied to the pipeline, saved, and measured with all in the file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dit_accel.denoiser.find import find_denoisers
from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.quantization.plan import plan
from dit_accel.weights.codebook import universal
from dit_accel.weights.encode import Encoded, data_free, layer_codebook
from dit_accel.weights.feedback import calibrate
from dit_accel.weights.rotation import block_of, draw_signs, rotate, rotate_hessian, unpack_signs
from dit_accel.weights.storage import store
from dit_accel.weights.vector_quant import Calibrate, VectorQuant

Quantised = dict[str, tuple[Tensor, int]]
Method = Callable[[Any, Mapping[str, Tensor]], Quantised]
BOOKS = {2: "256x4", 3: "64x2", 4: "256x2"}


def denoiser_of(pipe: Any) -> nn.Module:
    """The denoiser of a pipeline that has one."""
    found = find_denoisers(pipe)
    if len(found) != 1:
        raise UnsupportedModelError(f"The pipeline has {len(found)} denoisers ({', '.join(found)}); one is measured.")
    return next(iter(found.values()))


def quantisable(model: nn.Module) -> dict[str, nn.Linear]:
    """Path -> linear layer, for those that ours quantises: in blocks, of at least 4096 weights."""
    planned = plan(model, VectorQuant())
    layers = {name: model.get_submodule(name) for name, format in planned.items() if format.kind == "linear"}
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}


def each_layer(function: Callable[[Tensor, Tensor | None], tuple[Tensor, int]]) -> Method:
    """A method from a function of one layer's weight [O, I] and Hessian [I, I]."""

    def method(pipe: Any, hessians: Mapping[str, Tensor]) -> Quantised:
        layers = quantisable(denoiser_of(pipe))
        return {name: function(layer.weight.detach().float(), hessians.get(name)) for name, layer in layers.items()}

    return method


def k_means(weight: Tensor, hessian: Tensor | None, *, bits: int) -> tuple[Tensor, int]:
    """The layer's own codebook and row scales, no data."""
    del hessian
    return _own(data_free(weight, layer_codebook(weight, *_size(bits))))


def rotated(weight: Tensor, hessian: Tensor | None, *, bits: int, data: bool) -> tuple[Tensor, int]:
    """Hadamard blocks as large as the row allows and the universal codebook; data: with feedback under the Hessian."""
    inputs, book = weight.shape[1], universal(BOOKS[bits])
    packed, block = draw_signs(inputs, 0), block_of(inputs)
    signs = unpack_signs(packed, inputs)
    turned = rotate(weight, signs, block)
    metric = rotate_hessian(_given(hessian), signs, block) if data else None
    made = data_free(turned, book) if metric is None else calibrate(turned, metric, book)
    stored = store(made, universal_name=BOOKS[bits], signs=packed, block=block)
    return stored.decode(), stored.nbytes


def own_feedback(weight: Tensor, hessian: Tensor | None, *, bits: int) -> tuple[Tensor, int]:
    """The layer's own codebook, with feedback and Newton steps of the codebook."""
    return _own(calibrate(weight, _given(hessian), layer_codebook(weight, *_size(bits)), newton=True))


def _own(made: Encoded) -> tuple[Tensor, int]:
    stored = store(made)
    return stored.decode(), stored.nbytes


def _size(bits: int) -> tuple[int, int]:
    """Codewords and weights of one."""
    _, entries, width = universal(BOOKS[bits]).shape
    return entries, width


def _given(hessian: Tensor | None) -> Tensor:
    if hessian is None:
        raise ArgumentError("The method needs a Hessian; collect one from calibration runs.")
    return hessian


_KINDS: dict[str, Callable[..., tuple[Tensor, int]]] = {
    "k-means": k_means,
    "universal": functools.partial(rotated, data=False),
    "feedback": functools.partial(rotated, data=True),
    "feedback-own": own_feedback,
}
OURS: dict[str, Method] = {
    f"{name}-{bits}": each_layer(functools.partial(function, bits=bits))
    for bits in BOOKS
    for name, function in _KINDS.items()
}


def _ours(bits: float, dense: tuple[str, ...] = ()) -> VectorQuant:
    """More bits where they matter, shared codebooks of the model's own, feedback, and a tuning of the whole.

    dense: layers that stay so."""
    calibrate = Calibrate(calls=320, sweeps=1, tuning=1000, rate=2e-3)
    return VectorQuant(
        mean_bits=bits, modulation_bits=2, codebook="model", method="feedback", calibrate=calibrate, dense=dense
    )


def _published(method: str) -> VectorQuant:
    """VQ4DiT as published: a codebook a layer, no rotation; or PV-Tuning in its place."""
    calibrate = Calibrate(calls=64, sweeps=1, block_steps=40)
    return VectorQuant(modulation_bits=2, codebook="layer", rotate=False, method=method, calibrate=calibrate)


WHOLE: dict[str, VectorQuant] = {
    "data-free-2": VectorQuant(),
    "vq4dit-2": _published("vq4dit"),
    "pv-tuning-2": _published("pv-tuning"),
    "ours-2": _ours(2.4),
    "ours-linear-2": _ours(2.4, ("embedding_table",)),  # class tables stay dense, as the rivals leave them
    "ours-3": _ours(3.2),
    "ours-4": _ours(4.2),
}
