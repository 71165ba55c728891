"""VQLinear and VQEmbedding against the dense layers that they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dit_accel.errors import UnsupportedModelError
from dit_accel.weights.codebook import universal
from dit_accel.weights.encode import data_free, layer_codebook
from dit_accel.weights.feedback import low_rank
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.linear import SharedCodebooks, VQEmbedding, VQLinear
from dit_accel.weights.rotation import draw_signs, rotate, unpack_signs
from dit_accel.weights.storage import Stored, store

FORMATS = {
    "plain": LayerFormat((40, 96), "16x4", "own", 0, 0, False),
    "rotated": LayerFormat((40, 96), "64x2", "own", 32),
    "stages": LayerFormat((40, 96), "16x4+16x4", "own", 32),
    "low rank": LayerFormat((40, 96), "256x4", "own", 32, 3),
    "shared": LayerFormat((40, 96), "256x4", "shared", 32),
    "embedding": LayerFormat((40, 96), "64x2", "own", 32, 2, False, "embedding"),
}


def made(format: LayerFormat, dtype: torch.dtype = torch.float32) -> tuple[VQLinear | VQEmbedding, Stored]:
    """A layer of a format with codes of a random weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(format.shape, generator=generator)
    signs = draw_signs(format.shape[1], 3) if format.block else None
    turned = weight if signs is None else rotate(weight, unpack_signs(signs, format.shape[1]), format.block)
    book = universal(format.codebook) if format.source == "shared" else None
    if book is None:
        book = layer_codebook(turned, format.entries, format.width, stages=format.stages)
    found = data_free(turned, book)
    if format.rank:
        from dataclasses import replace

        found = replace(found, low_rank=low_rank(turned - found.core(), None, format.rank))
    stored = store(found, signs=signs, block=format.block)
    books = SharedCodebooks({format.codebook: format.book_shape}, dtype=dtype) if format.source == "shared" else None
    if books is not None:
        books.book(format.codebook).copy_(book)
    layer: VQLinear | VQEmbedding
    if format.kind == "embedding":
        layer = VQEmbedding(format, books, dtype=dtype)
    else:
        layer = VQLinear(format, books, dtype=dtype)
        if layer.bias is not None:
            nn.init.normal_(layer.bias, generator=generator)
    layer.load(stored)
    return layer.requires_grad_(False), stored


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.kind == "linear"])
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_a_linear_layer_is_that_of_its_decoded_weight(name: str, tokens: int) -> None:
    layer, stored = made(FORMATS[name])
    assert isinstance(layer, VQLinear) and isinstance(layer, nn.Linear)
    x = torch.randn(2, tokens, 96, generator=torch.Generator().manual_seed(1))
    wanted = nn.functional.linear(
        x.double(), stored.decode().double(), None if layer.bias is None else layer.bias.double()
    )
    # Sums of 96 products in another order, and the rotation's: some 1e-6 of the size of the outputs.
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_an_embedding_looks_up_decoded_rows() -> None:
    layer, stored = made(FORMATS["embedding"])
    assert isinstance(layer, VQEmbedding) and isinstance(layer, nn.Embedding)
    rows = torch.tensor([[0, 39, 7], [7, 7, 1]])
    torch.testing.assert_close(layer(rows), stored.decode()[rows], rtol=1e-5, atol=1e-6)


def test_the_weight_is_read_and_not_written() -> None:
    layer, stored = made(FORMATS["rotated"])
    assert layer.weight.shape == (40, 96) and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"
    torch.testing.assert_close(layer.weight + 0.0, stored.decode())
    with pytest.raises(UnsupportedModelError, match="cannot be written to"):
        layer.weight.data = torch.zeros(40, 96)
    with pytest.raises(UnsupportedModelError, match="cannot be written to"):
        layer.weight.add_(1.0)
    torch.testing.assert_close(layer.weight + 0.0, stored.decode())


def test_autocast_is_as_for_a_dense_layer() -> None:
    layer, stored = made(FORMATS["rotated"])
    dense = nn.Linear(96, 40)
    dense.load_state_dict({"weight": stored.decode(), "bias": layer.bias})
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        result, wanted = layer(x), dense(x)
    assert result.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(result, wanted, rtol=0.05, atol=0.05 * float(wanted.float().abs().max()))


def test_a_copy_is_its_own() -> None:
    layer, stored = made(FORMATS["low rank"])
    other = copy.deepcopy(layer)
    with torch.no_grad():
        layer.row_scale.zero_()
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(other(x), nn.functional.linear(x, stored.decode(), other.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_state_is_what_the_format_says(name: str) -> None:
    format = FORMATS[name]
    layer, _ = made(format, torch.bfloat16)
    bias = {"bias"} if format.bias else set()
    state = layer.state_dict()
    assert set(state) == set(format.tensors()) | bias
    for key, (shape, holds_bytes) in format.tensors().items():
        assert state[key].shape == shape and state[key].dtype == (torch.uint8 if holds_bytes else torch.bfloat16)
    nbytes = sum(value.numel() * value.element_size() for key, value in state.items() if key != "bias")
    assert nbytes == format.nbytes()
