"""Small attention calls, and attention written out token by token."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.score import Call
from dit_accel.attention.search import Memory, always_kept


@pytest.fixture
def draw() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`draw(batch, heads, tokens, dim, seed=0)` -> q, k, v [B, H, S, D]."""

    def make(batch: int, heads: int, tokens: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, batch, heads, tokens, dim, generator=generator)
        return q, k, v

    return make


@pytest.fixture
def call() -> Callable[..., Call]:
    """`call(settings, q, k, v=None, grid=None, ...)`: a call in the order of its layout; no grid: one row."""

    def make(
        settings: BlockSparse,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        grid: TokenGrid | None = None,
        key_bias: Tensor | None = None,
        memory: Memory | None = None,
        layer: str = "",
        scale: float | None = None,
    ) -> Call:
        grid = grid or TokenGrid(1, 1, q.shape[2])
        layout = layout_of(grid, settings.order, settings.tile, settings.block_size)
        always = always_kept(layout, settings.keep, settings.text_queries_dense)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return Call(q, k, k if v is None else v, factor, key_bias, layout, settings, always, memory, layer)

    return make


@pytest.fixture
def true_map() -> Callable[..., list[list[float]]]:
    """`true_map(q, k, scale, key_bias=None)`: softmax of [S, D] queries and keys, one query and one key at a time."""

    def make(q: Tensor, k: Tensor, scale: float, key_bias: Tensor | None = None) -> list[list[float]]:
        rows = []
        for query in q.double().tolist():
            scores = [scale * sum(a * b for a, b in zip(query, key)) for key in k.double().tolist()]
            if key_bias is not None:
                scores = [score + bias for score, bias in zip(scores, key_bias.tolist())]
            largest = max(scores)
            weights = [math.exp(score - largest) for score in scores]
            rows.append([weight / sum(weights) for weight in weights])
        return rows

    return make
