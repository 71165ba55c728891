"""Allocate: more bits for layers whose codes would change the model's outputs most, within a mean number of bits.

Each layer is tried alone with data-free codes at the fewest bits; what that does to the outputs on a few calibration
calls is its worth. Errors of vector codes fall by a known factor from one size of codebook to the next, so the gain of
every upgrade is known too, and the best gains for their bytes are taken until the bytes are spent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dit_accel.denoiser.whole import tensors_in
from dit_accel.errors import PolicyError
from dit_accel.quantization.calibrate import Progress, data_free, weight_of
from dit_accel.quantization.collect import Call, can_be_joined, joined
from dit_accel.weights.codebook import UNIVERSAL, universal
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.vector_quant import SIZES, VectorQuant

_CALLS = 8  # that every layer is tried on
# Squared error of normal vectors in the codebooks of 2, 3 and 4 bits (docs/weights.md).
ERRORS = {SIZES[2]: 0.0973, SIZES[3]: 0.0298, SIZES[4]: 0.0078}


@torch.no_grad()
def allocate(
    model: nn.Module,
    formats: Mapping[str, LayerFormat],
    calls: Sequence[Call],
    settings: VectorQuant,
    progress: Progress,
) -> dict[str, LayerFormat]:
    """Formats of 2, 3 or 4 bits whose bytes are at most `settings.mean_bits` a weight; the layers stay as they are.

    Tables of embeddings are not counted, and keep theirs.
    Raises PolicyError where even the fewest bits take more.
    """
    assert settings.mean_bits is not None
    fewest = {name: _at(made, SIZES[2]) for name, made in formats.items() if made.kind == "linear"}
    weights = sum(made.shape[0] * made.shape[1] for made in fewest.values())
    budget = settings.mean_bits * weights / 8 - sum(made.nbytes() for made in fewest.values())
    if budget < 0:
        least = 8 * sum(made.nbytes() for made in fewest.values()) / weights
        raise PolicyError(
            f"VectorQuant.mean_bits is {settings.mean_bits:g}, and 2-bit codes with their scales take {least:.3f} "
            "here; give more."
        )
    worth = _worth(model, fewest, _spread(model, calls), settings, progress)
    return dict(formats) | spend(fewest, worth, budget)


def spend(formats: Mapping[str, LayerFormat], worth: Mapping[str, float], budget: float) -> dict[str, LayerFormat]:
    """Upgrades of the best gain a byte until `budget` bytes are spent; each layer one size up at a time.

    worth: what a layer costs in output error at the size it has.
    """
    made, left = dict(formats), budget
    full: set[str] = set()  # layers that no upgrade fits any more
    while len(full) < len(made):
        name = max((n for n in made if n not in full), key=lambda n: _gain(made[n], formats[n], worth[n]))
        larger = _larger(made[name])
        cost = 0 if larger is None else larger.nbytes() - made[name].nbytes()
        if larger is None or cost > left:
            full.add(name)
            continue
        made[name], left = larger, left - cost
    return made


def _gain(made: LayerFormat, first: LayerFormat, worth: float) -> float:
    """Fall of the output error for each byte of the next size up."""
    larger = _larger(made)
    if larger is None:
        return -1.0
    fall = worth * (ERRORS[made.codebook] - ERRORS[larger.codebook]) / ERRORS[first.codebook]
    return fall / (larger.nbytes() - made.nbytes())


def _larger(made: LayerFormat) -> LayerFormat | None:
    sizes = list(ERRORS)
    place = sizes.index(made.codebook) + 1
    return _at(made, sizes[place]) if place < len(sizes) else None


def _at(made: LayerFormat, size: str) -> LayerFormat:
    return dataclasses.replace(made, codebook=size)


def _spread(model: nn.Module, calls: Sequence[Call]) -> list[Call]:
    count = min(_CALLS, len(calls))
    chosen = [calls[number * len(calls) // count] for number in range(count)]
    return [joined(chosen)] if can_be_joined(model, chosen) else chosen


def _worth(
    model: nn.Module,
    formats: Mapping[str, LayerFormat],
    calls: Sequence[Call],
    settings: VectorQuant,
    progress: Progress,
) -> dict[str, float]:
    """Relative squared error of the outputs with one layer at a time at its format."""
    plain = dataclasses.replace(settings, codebook="universal", rotate=True)
    books = {size: universal(size) for size in UNIVERSAL}
    energy = sum(float(t.float().square().sum()) for call in calls for t in call.output)
    found: dict[str, float] = {}
    for number, (name, format) in enumerate(formats.items()):
        progress("what each layer is worth", number, len(formats))
        layer = model.get_submodule(name)
        weight, kept = weight_of(layer), weight_of(layer).clone()
        trial = dataclasses.replace(format, source="shared", rank=0)
        try:
            weight.copy_(data_free(name, layer, trial, books, plain).decode())
            found[name] = _error(model, calls) / energy
        finally:
            weight.copy_(kept)
    progress("what each layer is worth", len(formats), len(formats))
    return found


def _error(model: nn.Module, calls: Sequence[Call]) -> float:
    total = 0.0
    for call in calls:
        made: list[Tensor] = tensors_in(model(*call.args, **call.kwargs))
        total += sum(float((a.float() - b.float()).square().sum()) for a, b in zip(made, call.output))
    return total
