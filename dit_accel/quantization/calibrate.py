"""Calibrate: codes of every planned layer of a denoiser, data-free or with what the layers see (stages 0 and 1).

Feedback goes group by group (a block is a group): the Hessians of a group are taken from the model as it is by then,
its earlier groups quantised, so that later layers make up for earlier errors. One group's Hessians are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from dit_accel.denoiser.find import find_block_lists
from dit_accel.quantization.collect import Call, collect_hessians, order_of
from dit_accel.quantization.install import encode_layer, packed, rotated, rotation_of, seed_of
from dit_accel.quantization.keep import Kept
from dit_accel.quantization.plan import shared_sizes
from dit_accel.weights.codebook import SAMPLE, kmeans, nearest, universal
from dit_accel.weights.encode import divisor, layer_codebook, root_mean_square, storable
from dit_accel.weights.feedback import calibrate
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.rotation import rotate_hessian, unpack_signs
from dit_accel.weights.storage import Stored
from dit_accel.weights.vector_quant import VectorQuant

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


def weight_of(layer: nn.Module) -> Tensor:
    """The dense weight of a layer -> [O, I], without its gradient."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def shared_books(
    layers: Mapping[str, nn.Module], formats: Mapping[str, LayerFormat], settings: VectorQuant
) -> dict[str, Tensor]:
    """Size -> the codebook [S, K, d] that layers share: universal, or fitted to the rows of all of them."""
    if settings.codebook == "universal":
        return {size: universal(size) for size in shared_sizes(formats)}
    return {size: _fitted(size, shape, layers, formats, settings.seed) for size, shape in shared_sizes(formats).items()}


def _fitted(
    size: str,
    shape: tuple[int, int, int],
    layers: Mapping[str, nn.Module],
    formats: Mapping[str, LayerFormat],
    seed: int,
) -> Tensor:
    """k-means over vectors of every layer with this size of codebook, at unit mean square; stage after stage."""
    names = [name for name, made in formats.items() if made.source == "shared" and made.codebook == size]
    many = sum(formats[name].shape[0] * formats[name].shape[1] for name in names)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name in names:
        weight = rotated(weight_of(layers[name]), formats[name], rotation_of(name, formats[name], seed)).cpu()
        vectors = (weight / divisor(root_mean_square(weight))).reshape(-1, shape[2])
        share = max(1, round(SAMPLE * weight.numel() / many))
        parts.append(vectors[torch.randperm(len(vectors), generator=generator)[:share]])
    left, stages = torch.cat(parts), []
    for _ in range(shape[0]):
        stages.append(storable(kmeans(left, min(shape[1], len(left)), seed=seed)))
        left = left - stages[-1][nearest(left, stages[-1])]
    return torch.stack(stages)


def encode_all(
    layers: Mapping[str, nn.Module],
    formats: Mapping[str, LayerFormat],
    books: Mapping[str, Tensor],
    settings: VectorQuant,
    kept: Kept,
    progress: Progress,
) -> Iterator[tuple[str, Stored]]:
    """Data-free codes of one layer after another, so that a caller can let go of each dense weight; touches none."""
    for number, (name, format) in enumerate(formats.items()):
        progress("data-free codes", number, len(formats))
        yield (
            name,
            kept.layer(name, format, books, lambda n=name, f=format: data_free(n, layers[n], f, books, settings)),
        )
    progress("data-free codes", len(formats), len(formats))


def data_free(
    name: str, layer: nn.Module, format: LayerFormat, books: Mapping[str, Tensor], settings: VectorQuant
) -> Stored:
    """Data-free codes of one layer."""
    book = books[format.codebook] if format.source == "shared" else None
    return encode_layer(name, weight_of(layer), format, settings.seed, book)


def _book(
    name: str,
    weight: Tensor,
    format: LayerFormat,
    books: Mapping[str, Tensor],
    settings: VectorQuant,
    importance: Tensor | None,
) -> Tensor:
    """The codebook for a turned weight [O, I] -> [S, K, d]."""
    if format.source == "shared":
        return books[format.codebook].to(weight.device)
    return layer_codebook(
        weight,
        format.entries,
        format.width,
        stages=format.stages,
        importance=importance,
        seed=seed_of(name, settings.seed),
    )


@torch.no_grad()
def feedback_all(
    model: nn.Module,
    formats: Mapping[str, LayerFormat],
    calls: Sequence[Call],
    books: Mapping[str, Tensor],
    settings: VectorQuant,
    kept: Kept,
    progress: Progress,
) -> dict[str, Stored]:
    """Codes under the Hessian, group by group. The layers are left dense, with the weights that their codes stand for.

    Layers that no call reaches, and tables whose rows are looked up, get data-free codes.
    """
    layers = {name: model.get_submodule(name) for name in formats}
    linear = {name: layer for name, layer in layers.items() if formats[name].kind == "linear"}
    order = order_of(model, linear, calls[0])
    found: dict[str, Stored] = {}
    groups = list(groups_of(model, order))
    for number, group in enumerate(groups):
        progress("codes under the Hessian", number, len(groups))
        hessians: dict[str, Tensor] = {}
        if not kept.has(group):
            inside = {name: layers[name] for name in group}
            hessians = collect_hessians(model, inside, calls, sum(name in group for name in order))
        for name in group:
            make = partial(_under_hessian, name, layers[name], formats[name], hessians.get(name), books, settings)
            found[name] = kept.layer(name, formats[name], books, make)
            set_weight(layers[name], found[name].decode())
    for name in formats:
        if name not in found:
            found[name] = kept.layer(
                name, formats[name], books, lambda n=name: data_free(n, layers[n], formats[n], books, settings)
            )
            set_weight(layers[name], found[name].decode())
    progress("codes under the Hessian", len(groups), len(groups))
    return {name: found[name] for name in formats}


def _under_hessian(
    name: str,
    layer: nn.Module,
    format: LayerFormat,
    hessian: Tensor | None,
    books: Mapping[str, Tensor],
    settings: VectorQuant,
) -> Stored:
    assert hessian is not None
    signs = rotation_of(name, format, settings.seed)
    weight = rotated(weight_of(layer), format, signs)
    if signs is not None:
        hessian = rotate_hessian(hessian, unpack_signs(signs.to(weight.device), format.shape[1]), format.block)
    own = format.source == "own"
    book = _book(name, weight, format, books, settings, hessian.diagonal() if own else None)
    sweeps = settings.calibrate.sweeps
    made = calibrate(weight, hessian, book, sweeps=sweeps, newton=own, rank=format.rank, seed=settings.seed)
    return packed(made, format, signs)


def groups_of(model: nn.Module, order: Sequence[str]) -> Iterator[list[str]]:
    """Layers of one block after another, as the model calls them; each layer once, at its first call."""
    paths = [f"{path}.{number}." for path, blocks in find_block_lists(model).items() for number in range(len(blocks))]
    block = {name: next(path for path in paths if name.startswith(path)) for name in order}
    first = list(dict.fromkeys(order))
    seen: dict[str, list[str]] = {}
    for path, names in groupby(first, key=lambda name: block[name]):
        seen.setdefault(path, []).extend(names)
    yield from seen.values()


def set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Give a dense layer another weight, a new Parameter: whoever holds the old one keeps it as it is."""
    old = layer.weight
    assert isinstance(old, nn.Parameter)
    layer.weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
