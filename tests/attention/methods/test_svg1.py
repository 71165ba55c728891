"""Sparse VideoGen: the two bands token by token, and each head's choice between them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.svg1 import bands, errors, scores, settings
from dit_accel.attention.score import Call

GRID = TokenGrid(6, 4, 8)  # frames of 32 tokens, two blocks of 16 each
LARGE = TokenGrid(6, 8, 12)  # frames of six blocks
Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def rule(rows: int = 64) -> BlockSparse:
    return settings(rows, 0.6, block_size=16)


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("width", [0.3, 1.5])
def test_bands_of_frames_and_of_places(order: str, width: float) -> None:
    layout = layout_of(GRID, order, (4, 4, 4), 16)
    by_frame, by_place = ([[False] * 12 for _ in range(12)] for _ in range(2))
    places = layout.coordinates.tolist()
    for i, (f, r, c) in enumerate(places):
        for j, (g, s, d) in enumerate(places):
            if abs((f - g) * 32 + (r - s) * 8 + (c - d)) < 32 * width:
                by_frame[i // 16][j // 16] = True
            if abs(((r - s) * 8 + (c - d)) * 6 + (f - g)) < 32 * width:
                by_place[i // 16][j // 16] = True
    made = bands(layout, width)
    assert made[0].tolist() == by_frame and made[1].tolist() == by_place


def heads_of_two_kinds(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Head 0 looks at its own half of a frame, head 1 at its own place in all frames."""
    q, k, v = draw(1, 2, LARGE.tokens, 32)
    token = torch.arange(LARGE.tokens)
    q[0, 0] = k[0, 0] = 10 * F.one_hot(token // 48, 32).float()
    q[0, 1] = k[0, 1] = 10 * F.one_hot(token % 96 // 4, 32).float()
    return q, k, v


def test_each_head_sees_what_it_looks_at(draw: Draw, call: Callable[..., Call]) -> None:
    q, k, v = heads_of_two_kinds(draw)
    made = scores(call(rule(), q, k, v, grid=LARGE)).probability
    frames, places = bands(layout_of(LARGE, "raster", (4, 4, 4), 16), 0.6)
    assert torch.equal(made[0, 0].bool(), frames) and torch.equal(made[0, 1].bool(), places)
    both = [torch.cat([x, x.flip(1)]) for x in (q, k, v)]
    assert torch.equal(scores(call(rule(), *both, grid=LARGE)).probability[1], made[0].flip(0)), "each sample by itself"
    assert set(made.unique().tolist()) == {0.0, 1.0} and not torch.equal(frames, places)


def test_errors_are_those_of_evenly_spaced_rows(draw: Draw, call: Callable[..., Call]) -> None:
    grid = TokenGrid(6, 4, 8, 20)
    q, k, v = draw(1, 2, grid.tokens, 8)
    made = call(rule(rows=5), q, k, v, grid=grid)
    masks = torch.stack(bands(made.layout, 0.6))
    rows = [0, 38, 76, 115, 153]  # n * 192 // 5, of the picture alone
    exact = F.scaled_dot_product_attention(q, k, v)[:, :, rows]
    for mask, error in zip(masks, errors(made, masks)):
        seen = (mask | made.always).repeat_interleave(16, 0).repeat_interleave(16, 1)[rows, : grid.tokens]
        masked = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=seen)
        assert torch.allclose(error, (masked - exact).square().mean((-1, -2)), rtol=1e-4)


def test_the_choice_is_the_same_every_time(draw: Draw, call: Callable[..., Call]) -> None:
    q, k, v = draw(2, 4, GRID.tokens, 8)
    one, two = (scores(call(rule(), q, k, v, grid=GRID)).probability for _ in range(2))
    assert torch.equal(one, two)
