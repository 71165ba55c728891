"""Refine: codes and codebooks of one block after another, until its outputs are the dense block's (stage 2).

VQ4DiT (2408.17131) chooses among candidate codes by learned ratios; PV-Tuning (2405.14852) moves codebooks and codes in
turn. A block gets the inputs that it has in the dense model, so blocks do not wait for each other and none is trained
on the errors of another; the loss is the mean square error of its outputs, over their energy.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dit_accel.denoiser.whole import tensors_in
from dit_accel.quantization.calibrate import Progress, groups_of, weight_of
from dit_accel.quantization.collect import Call, order_of, watching
from dit_accel.quantization.install import packed, rotated
from dit_accel.quantization.keep import Kept
from dit_accel.weights.encode import Encoded
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.packing import unpack
from dit_accel.weights.pv_tuning import continuous_step, discrete_step
from dit_accel.weights.rotation import unpack_signs, unrotate
from dit_accel.weights.storage import Stored
from dit_accel.weights.vector_quant import VectorQuant
from dit_accel.weights.vq4dit import candidates, encoded, train_together

_BATCH = 4  # block calls of one gradient step of VQ4DiT
_FIXED = 8  # block calls that PV-Tuning's steps are accepted on


@dataclasses.dataclass(frozen=True)
class Opened:
    """The codes of a layer in numbers, and the way back to its own inputs. signs: [I] of 1 and -1, or None."""

    format: LayerFormat
    signs: Tensor | None
    made: Encoded

    @staticmethod
    def of(stored: Stored, format: LayerFormat) -> Opened:
        """The numbers of what is stored."""
        codes = unpack(stored.codes, format.code_bits, format.codes_per_row).unflatten(1, (format.stages, -1))
        rank = None if stored.low_rank is None else (stored.low_rank[0].float(), stored.low_rank[1].float())
        made = Encoded(codes.long(), stored.row_scale.float(), stored.book().float(), rank)
        signs = None if stored.signs is None else unpack_signs(stored.signs, format.shape[1])
        return Opened(format, signs, made)

    def back(self, weight: Tensor) -> Tensor:
        """A weight in the inputs of the codes, in those of the layer -> [O, I]; differentiable."""
        return weight if self.signs is None else unrotate(weight, self.signs, self.format.block)


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block and what it was called with in the dense model. layers: name in the block -> name in the model."""

    module: nn.Module
    layers: dict[str, str]
    calls: list[Call]

    def loss(self, weights: Mapping[str, Tensor], calls: Sequence[Call]) -> Tensor:
        """Error of the outputs over their energy, with these weights [O, I] by names in the block."""
        given = {f"{name}.weight": weight for name, weight in weights.items()}
        total = torch.zeros(())
        for call in calls:
            outputs = tensors_in(functional_call(self.module, given, call.args, call.kwargs))
            for output, wanted in zip(outputs, call.output):
                energy = wanted.float().square().mean().clamp(min=1e-12)
                total = total.to(energy.device) + (output.float() - wanted.float()).square().mean() / energy
        return total / len(calls)


def refine_blocks(
    model: nn.Module,
    formats: Mapping[str, LayerFormat],
    found: Mapping[str, Stored],
    calls: Sequence[Call],
    settings: VectorQuant,
    kept: Kept,
    progress: Progress,
) -> dict[str, Stored]:
    """Codes of every layer that calls reach, refined; the model itself stays as it is, dense."""
    linear = {name: model.get_submodule(name) for name in formats if formats[name].kind == "linear"}
    groups = list(groups_of(model, order_of(model, linear, calls[0])))
    refine = _vq4dit if settings.method == "vq4dit" else _pv_tuning
    result = dict(found)
    for number, group in enumerate(groups):
        progress(f"{settings.method}, block by block", number, len(groups))
        names = [f"refined {name}" for name in group]
        made: dict[str, Stored] = {}
        if not kept.has(names):
            block = _block(model, group, calls)
            made = refine(block, {name: found[name] for name in group}, formats, settings)
        for name in group:
            format = formats[name]
            book = {} if format.source == "own" else {format.codebook: found[name].book()}
            result[name] = kept.layer(f"refined {name}", format, book, partial(made.__getitem__, name))
    progress(f"{settings.method}, block by block", len(groups), len(groups))
    return result


@torch.no_grad()
def _block(model: nn.Module, group: Sequence[str], calls: Sequence[Call]) -> _Block:
    """The block that these layers are in, and its calls in the dense model."""
    path = _path_of(model, group)
    block, seen = model.get_submodule(path), []

    def see(name: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        del name
        outputs = tuple(tensor.clone() for tensor in tensors_in(result))
        seen.append(Call(_cloned(args), _cloned(kwargs), outputs, 0, len(seen)))

    for call in calls:
        with watching({path: block}, see, 1):
            model(*call.args, **call.kwargs)
    return _Block(block, {name.removeprefix(f"{path}."): name for name in group}, seen)


def _path_of(model: nn.Module, group: Sequence[str]) -> str:
    """The path of the block: the member of a module list that all layers of the group are in."""
    parts = group[0].split(".")
    for count in range(1, len(parts)):
        path, last = ".".join(parts[:count]), parts[count]
        if isinstance(model.get_submodule(path), nn.ModuleList) and last.isdecimal():
            return f"{path}.{last}"
    raise AssertionError(f"{group[0]} is in no list of blocks")


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _cloned(item) for key, item in value.items()}
    return type(value)(_cloned(item) for item in value) if isinstance(value, (tuple, list)) else value


def _vq4dit(
    block: _Block, found: Mapping[str, Stored], formats: Mapping[str, LayerFormat], settings: VectorQuant
) -> dict[str, Stored]:
    """VQ4DiT's ratios and codebooks for all layers of a block at once. A shared codebook does not learn."""
    wanted = settings.calibrate
    opened = {name: Opened.of(found[name], formats[name]) for name in block.layers.values()}
    states = []
    for inner, name in block.layers.items():
        one = opened[name]
        weight = rotated(weight_of(block.module.get_submodule(inner)), one.format, found[name].signs)
        states.append(candidates(weight, one.made.codebook[0], wanted.candidates, one.made.row_scale))
    rng = random.Random(settings.seed)

    def loss(weights: list[Tensor]) -> Tensor:
        back = {i: opened[n].back(w) for (i, n), w in zip(block.layers.items(), weights)}
        return block.loss(back, rng.sample(block.calls, min(_BATCH, len(block.calls))))

    shared = any(one.format.source == "shared" for one in opened.values())
    trained = train_together(states, loss, wanted.block_steps, codebook_rate=0.0 if shared else 1e-4)
    return {
        name: packed(encoded(state), formats[name], found[name].signs)
        for name, state in zip(block.layers.values(), trained)
    }


def _pv_tuning(
    block: _Block, found: Mapping[str, Stored], formats: Mapping[str, LayerFormat], settings: VectorQuant
) -> dict[str, Stored]:
    """Rounds over the layers of a block: the codebook and scales of each, then some of its codes, others fixed."""
    opened = {name: Opened.of(found[name], formats[name]) for name in block.layers.values()}
    made = {name: one.made for name, one in opened.items()}
    spread = [block.calls[number * len(block.calls) // _FIXED] for number in range(_FIXED)]
    calls = list({id(call): call for call in spread}.values())
    rounds = max(1, settings.calibrate.block_steps // (10 * len(made)))

    def loss_of(moving: str) -> Callable[[Tensor], Tensor]:
        fixed = {i: opened[n].back(made[n].dense()).detach() for i, n in block.layers.items() if n != moving}
        inner = next(i for i, n in block.layers.items() if n == moving)
        return lambda weight: block.loss(fixed | {inner: opened[moving].back(weight)}, calls)

    for _ in range(rounds):
        for name, one in opened.items():
            loss, shared = loss_of(name), one.format.source == "shared"
            made[name] = continuous_step(made[name], loss, 5, keep_codebook=shared)
            made[name] = discrete_step(made[name], loss)
    return {name: packed(made[name], formats[name], found[name].signs) for name in made}
