"""Install: quantised layers in the place of dense ones, and back. Every swap has its equal and opposite."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import UnsupportedModelError
from dit_accel.quantization.plan import shared_sizes
from dit_accel.weights.codebook import chunk_of, universal
from dit_accel.weights.encode import Encoded, data_free, layer_codebook
from dit_accel.weights.feedback import low_rank
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.linear import SCRATCH_MB, SharedCodebooks, VQEmbedding, VQLinear
from dit_accel.weights.packing import pack
from dit_accel.weights.rotation import draw_signs, rotate, unpack_signs
from dit_accel.weights.storage import Stored, store

BOOKS = "vq_codebooks"  # name of the module in a model that holds the codebooks its layers share
# Weights whose codes are looked for at once; float32 copies of them, a dozen, are 12 MiB on a CPU, and 200 on a GPU.
_AT_ONCE, _AT_ONCE_ON_GPU = 2**18, 2**22


def put(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in the place of the one of that name -> the one that was there; nothing else changes."""
    path, _, last = name.rpartition(".")
    parent = model.get_submodule(path)
    before = parent.get_submodule(last)
    setattr(parent, last, module)
    return before


def put_back(model: nn.Module, name: str, module: nn.Module) -> None:
    """The inverse of `put`. Where an adapter was put around the quantised layer since, it is then around this one."""
    there: Any = model.get_submodule(name)
    if isinstance(there, (VQLinear, VQEmbedding)):
        put(model, name, module)
    else:
        there.base_layer = module


def coded_like(
    layer: nn.Module,
    format: LayerFormat,
    books: SharedCodebooks | None,
    *,
    scratch_mb: float = SCRATCH_MB,
    dtype: torch.dtype | None = None,
) -> VQLinear | VQEmbedding:
    """A quantised layer for this dense one: same bias (the very Parameter), device and mode, codes still empty.

    dtype: of scales and codebook; the dense weight's by default.
    """
    weight: Any = layer.weight
    place: dict[str, Any] = {"device": weight.device, "dtype": dtype or weight.dtype}
    made: VQLinear | VQEmbedding
    if format.kind == "embedding":
        made = VQEmbedding(format, books, padding_idx=getattr(layer, "padding_idx", None), **place)
    else:
        made = VQLinear(format, books, scratch_mb=scratch_mb, **place)
        if format.bias:
            made.bias = layer.bias  # pyright: ignore[reportAttributeAccessIssue]
    return made.train(layer.training)


def add_codebooks(
    model: nn.Module,
    formats: Mapping[str, LayerFormat],
    *,
    values: Mapping[str, Tensor] | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> SharedCodebooks | None:
    """Give the model the codebooks that its layers share -> them, or None where every layer has its own.

    values: size -> [S, K, d]; the universal ones where none are given. On the meta device they stay empty.
    """
    sizes = shared_sizes(formats)
    if not sizes:
        return None
    if hasattr(model, BOOKS):
        raise UnsupportedModelError(f"{type(model).__name__} is quantised already; dequantize it first.")
    books = SharedCodebooks(sizes, device, dtype)
    if torch.device(device or "cpu").type != "meta":
        for name in sizes:
            books.book(name).copy_(universal(name) if values is None else values[name])
    model.add_module(BOOKS, books)
    return books


def remove_codebooks(model: nn.Module) -> None:
    """The inverse of `add_codebooks`."""
    if hasattr(model, BOOKS):
        delattr(model, BOOKS)


def seed_of(name: str, seed: int) -> int:
    """The seed of one layer: differs from layer to layer, and is the same in every process."""
    return zlib.crc32(f"{seed}:{name}".encode())


def rotation_of(name: str, format: LayerFormat, seed: int) -> Tensor | None:
    """Packed signs of a layer's rotation -> uint8 [ceil(I / 8)]; None where its inputs are not rotated."""
    return draw_signs(format.shape[1], seed_of(name, seed)) if format.block else None


def rotated(weight: Tensor, format: LayerFormat, signs: Tensor | None) -> Tensor:
    """A weight in the inputs of its codes -> float32 [O, I]."""
    return _turned(weight, _factors(weight, format, signs), format)


def _factors(weight: Tensor, format: LayerFormat, signs: Tensor | None) -> Tensor | None:
    """The signs as numbers on the weight's device -> float32 [I]."""
    return None if signs is None else unpack_signs(signs.to(weight.device), format.shape[1])


def _turned(rows: Tensor, factors: Tensor | None, format: LayerFormat) -> Tensor:
    """Rows of a weight in the inputs of their codes -> float32 [rows, I]. factors: as of `_factors`."""
    return rows.float() if factors is None else rotate(rows.float(), factors, format.block)


def encode_layer(name: str, weight: Tensor, format: LayerFormat, seed: int, book: Tensor | None) -> Stored:
    """Data-free codes of one weight [O, I]. book: the shared codebook [S, K, d]; None for one of its own.

    Rows are independent of each other and taken some at a time, so beside the weight there are some MiB. A codebook
    of the layer's own and a low-rank part look at all rows at once, at 8 bytes a weight.
    """
    signs = rotation_of(name, format, seed)
    factors = _factors(weight, format, signs)
    if book is None:
        turned = _turned(weight, factors, format)
        book = layer_codebook(turned, format.entries, format.width, stages=format.stages, seed=seed_of(name, seed))
        del turned
    book = book.float().to(weight.device)
    # What stays is set aside before what goes, so that the heap is not left full of holes.
    codes = torch.empty(format.tensors()["codes"][0], dtype=torch.uint8, device=weight.device)
    scales = torch.empty(format.shape[0], dtype=torch.bfloat16, device=weight.device)
    for run in _runs(format, weight.device):
        part = data_free(_turned(weight[run], factors, format), book)
        codes[run], scales[run] = pack(part.codes.flatten(1), format.code_bits), part.row_scale
    signs = None if signs is None else signs.to(weight.device)
    made = Stored(codes, scales, signs, book.bfloat16(), None, format.code_bits, format.shape, format.block)
    if not format.rank:
        return made
    left = torch.empty(format.shape, device=weight.device)
    for run in _runs(format, weight.device):
        found = made.rows_into(run, torch.empty_like(left[run]))
        torch.sub(_turned(weight[run], factors, format), found, out=left[run])
    first, second = low_rank(left, None, format.rank, seed=seed_of(name, seed))
    return dataclasses.replace(made, low_rank=(first.bfloat16(), second.bfloat16()))


def _runs(format: LayerFormat, device: torch.device) -> list[slice]:
    """Rows that are encoded at once; whole runs of the vectors that `nearest` takes at once, so that every vector is in
    the same place of the same product as if all rows were, and gets the same code."""
    outputs, inputs = format.shape
    chunk, most = chunk_of(device), _AT_ONCE if device.type == "cpu" else _AT_ONCE_ON_GPU
    whole = chunk // math.gcd(chunk, inputs // format.width)
    step = max(most // inputs // whole, 1) * whole
    return [slice(first, min(first + step, outputs)) for first in range(0, outputs, step)]


def packed(made: Encoded, format: LayerFormat, signs: Tensor | None) -> Stored:
    """What was found for a weight, as it is stored."""
    return store(made, signs=None if signs is None else signs.to(made.codes.device), block=format.block)


def tensors_of(stored: Stored, format: LayerFormat) -> dict[str, Tensor]:
    """The tensors of a weight by their names in a file; without the codebook where it is shared."""
    found: dict[str, Any] = {"codes": stored.codes, "row_scale": stored.row_scale, "signs": stored.signs}
    found["codebook"] = stored.book()
    if stored.low_rank is not None:
        found |= {"low_rank_a": stored.low_rank[0], "low_rank_b": stored.low_rank[1]}
    return {name: found[name] for name in format.tensors()}
