"""Attention through kept blocks, against torch's own and against a mask of tokens."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.attention.attend import Attended, attend
from dit_accel.attention.block_sparse import BlockSparse, Sort
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import Layout, layout_of
from dit_accel.attention.recall import recall
from dit_accel.attention.search import Memory
from dit_accel.errors import ArgumentError

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]
SCALE = 16**-0.5
GRIDS = [
    TokenGrid(2, 6, 8),
    TokenGrid(3, 5, 7),
    TokenGrid(1, 9, 11, 13),
    TokenGrid(2, 5, 8, 20, text_first=True),
    TokenGrid(1, 1, 131),
]
EVERYTHING = BlockSparse(0.0, threshold=0.0, block_size=16)  # every mean score is above 0, but nothing knows beforehand


def of(settings: BlockSparse, grid: TokenGrid) -> Layout:
    return layout_of(grid, settings.order, settings.tile, settings.block_size)


def run(settings: BlockSparse, grid: TokenGrid, tensors: tuple[Tensor, ...], step: int = 0, **more: object) -> Attended:
    q, k, v = tensors
    return attend(settings, of(settings, grid), q, k, v, scale=SCALE, step=step, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["raster", "tile", "hilbert"])
def test_density_1_is_torchs_attention_to_the_bit(draw: Draw, grid: TokenGrid, order: str) -> None:
    q, k, v = draw(2, 3, grid.tokens, 16)
    exact = F.scaled_dot_product_attention(q, k, v, scale=SCALE)
    for settings in (BlockSparse(1.0, order=order), BlockSparse(1.0, order=order, sort=Sort(64), block_size=16)):
        made = run(settings, grid, (q, k, v))
        assert torch.equal(made.output, exact) and (made.density, made.searched, made.memory) == (1.0, False, None)
    hidden = torch.rand(2, 1, grid.tokens) > 0.3
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden[:, :, None], scale=SCALE)
    assert torch.equal(run(BlockSparse(1.0), grid, (q, k, v), key_bias=hidden).output, masked)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["raster", "tile", "hilbert"])
def test_there_and_back_with_every_block_is_torchs_attention(draw: Draw, grid: TokenGrid, order: str) -> None:
    q, k, v = draw(2, 3, grid.tokens, 16)
    exact = F.scaled_dot_product_attention(q, k, v, scale=SCALE)
    for sort in (None, Sort(32)):
        made = run(replace(EVERYTHING, order=order, sort=sort), grid, (q, k, v))
        assert made.density == 1.0 and made.searched
        assert float((made.output - exact).abs().max()) < 1e-6


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["raster", "tile", "hilbert"])
@pytest.mark.parametrize("sort", [None, Sort(32)])
def test_sparse_attention_is_that_of_a_mask_of_tokens(
    draw: Draw, grid: TokenGrid, order: str, sort: Sort | None
) -> None:
    q, k, v = draw(2, 3, grid.tokens, 16)
    bias = torch.zeros(2, 1, grid.tokens)
    bias[1, :, -6:] = -math.inf
    bias[0, :, 4] = 2.0
    settings = BlockSparse(0.3, order=order, block_size=16, sort=sort)
    made = run(settings, grid, (q, k, v), key_bias=bias)
    assert made.memory is not None and 0.1 < made.density < 0.95
    layout, keep = of(settings, grid), made.memory.mask.to_dense()
    block_of_query = layout.inverse // 16
    seen = keep[:, :, block_of_query]  # [B, H, S, n]
    if made.memory.key_order is None:
        block_of_key = block_of_query.expand(2, 3, -1)
    else:  # place in the layout -> place among the sorted keys
        block_of_key = (made.memory.key_order.argsort(-1) // 16)[:, :, layout.inverse]
    allowed = seen.gather(-1, block_of_key.unsqueeze(-2).expand(-1, -1, grid.tokens, -1))
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf) + bias.unsqueeze(-2)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)
    assert torch.allclose(made.output, expected.nan_to_num(0.0), atol=2e-6)
    assert made.density == pytest.approx(float(keep.float().mean()))


@pytest.mark.parametrize("shape", [(1, 1, 96), (2, 3, 96), (96,), (1, 96), (2, 1, 1)])
def test_a_key_bias_of_any_shape_that_broadcasts(draw: Draw, shape: tuple[int, ...]) -> None:
    grid = GRIDS[0]
    q, k, v = draw(2, 3, grid.tokens, 16)
    bias = torch.randn(shape)
    exact = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias.expand(2, 3, 96).unsqueeze(-2).contiguous(), scale=SCALE
    )
    for settings in (EVERYTHING, replace(EVERYTHING, order="hilbert"), BlockSparse(1.0)):
        assert torch.allclose(run(settings, grid, (q, k, v), key_bias=bias).output, exact, atol=1e-6)


def test_a_bool_hides_keys(draw: Draw) -> None:
    grid = GRIDS[0]
    q, k, v = draw(2, 3, grid.tokens, 16)
    shown = torch.ones(2, 1, grid.tokens, dtype=torch.bool)
    shown[1, :, 30:] = False
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=shown.unsqueeze(-2), scale=SCALE)
    made = run(replace(EVERYTHING, order="hilbert", density=0.999), grid, (q, k, v), key_bias=shown)
    assert torch.allclose(made.output, exact, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- memory


def test_blocks_are_used_again_until_the_next_search(draw: Draw) -> None:
    grid, settings = GRIDS[0], BlockSparse(0.3, block_size=16, search_every=3)
    memory: Memory | None = None
    searched, masks = [], []
    for step in range(7):
        made = run(settings, grid, draw(2, 3, grid.tokens, 16, seed=step), step, memory=memory)
        memory = made.memory
        assert memory is not None
        searched.append(made.searched)
        masks.append(memory.mask.to_dense())
    assert searched == [True, False, False, True, False, False, True]
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[2], masks[3])


def test_the_order_of_keys_is_used_again_as_well(draw: Draw) -> None:
    grid, settings = GRIDS[0], BlockSparse(0.0, threshold=0.0, block_size=16, search_every=3, sort=Sort(32))
    first = run(settings, grid, draw(1, 2, grid.tokens, 16))
    q, k, v = draw(1, 2, grid.tokens, 16, seed=1)
    second = run(settings, grid, (q, k, v), 1, memory=first.memory)
    assert not second.searched and second.memory is first.memory
    exact = F.scaled_dot_product_attention(q, k, v, scale=SCALE)
    assert torch.allclose(second.output, exact, atol=1e-6)


def test_a_memory_of_another_shape_layout_or_setting_is_dropped(draw: Draw) -> None:
    grid, settings = GRIDS[0], BlockSparse(0.3, block_size=16, search_every=99)
    q, k, v = draw(2, 3, grid.tokens, 16)
    memory = run(settings, grid, (q, k, v)).memory
    assert not run(settings, grid, (q, k, v), 1, memory=memory).searched
    assert run(settings, grid, (q[:1], k[:1], v[:1]), 1, memory=memory).searched
    assert run(settings, TokenGrid(1, 8, 12), (q, k, v), 1, memory=memory).searched
    assert run(replace(settings, order="hilbert"), grid, (q, k, v), 1, memory=memory).searched
    assert run(replace(settings, keep=("sink",)), grid, (q, k, v), 1, memory=memory).searched


def test_a_search_leaves_no_trace_in_the_gradients(draw: Draw) -> None:
    grid, settings = GRIDS[0], BlockSparse(0.3, score="mass", block_size=16, impl="gather", order="hilbert")
    q, k, v = (x.requires_grad_() for x in draw(1, 2, grid.tokens, 16))
    made = run(settings, grid, (q, k, v))
    made.output.sum().backward()
    assert made.memory is not None and made.memory.lse is not None and not made.memory.lse.requires_grad
    assert all(x.grad is not None and bool(torch.isfinite(x.grad).all()) for x in (q, k, v))


def test_blocks_are_chosen_in_full_precision_under_autocast(draw: Draw) -> None:
    grid, settings = GRIDS[0], BlockSparse(0.3, block_size=16)
    tensors = draw(1, 4, grid.tokens, 16)
    plain = run(settings, grid, tensors).memory
    with torch.autocast("cpu", torch.bfloat16):
        same = run(replace(settings, search_every=2), grid, tensors).memory
    assert plain is not None and same is not None
    assert torch.equal(plain.mask.to_dense(), same.mask.to_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_and_comes_out(draw: Draw, dtype: torch.dtype) -> None:
    grid = GRIDS[3]
    q, k, v = (x.to(dtype) for x in draw(1, 2, grid.tokens, 16))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=SCALE)
    made = run(replace(EVERYTHING, order="hilbert"), grid, (q, k, v)).output
    assert made.dtype == dtype and float((made.float() - exact).abs().max()) < 2e-2


# --------------------------------------------------------------------------------------------------------------- errors


def test_what_does_not_fit_is_refused(draw: Draw) -> None:
    grid, settings = GRIDS[0], BlockSparse(0.3, block_size=16)
    q, k, v = draw(2, 3, grid.tokens, 16)
    with pytest.raises(ArgumentError, match=r"There are 95 tokens, but .* holds 96"):
        run(settings, grid, (q[:, :, 1:], k[:, :, 1:], v[:, :, 1:]))
    with pytest.raises(ArgumentError, match="leave cross-attention dense"):
        run(settings, grid, (q, k[:, :, 1:], v[:, :, 1:]))
    with pytest.raises(ArgumentError, match="use layout_of with those"):
        attend(settings, of(replace(settings, order="tile"), grid), q, k, v, scale=SCALE, step=0)
    with pytest.raises(ArgumentError, match=r"key_bias is \[2, 3, 95\]"):
        run(settings, grid, (q, k, v), key_bias=torch.zeros(2, 3, 95))


# --------------------------------------------------------------------------------------------------------------- recall


def test_recall_is_the_attention_on_kept_blocks(draw: Draw, true_map: Callable[..., list[list[float]]]) -> None:
    grid, settings = TokenGrid(1, 1, 56), BlockSparse(0.3, block_size=16)
    q, k, v = draw(2, 2, 56, 16)
    memory = run(settings, grid, (q, k, v)).memory
    assert memory is not None
    bias = torch.randn(2, 2, 56)
    made = recall(q, k, memory.mask, SCALE, bias)
    keep = memory.mask.to_dense()
    for b, h in ((0, 0), (1, 0), (1, 1)):
        rows = true_map(q[b, h], k[b, h], SCALE, bias[b, h])
        caught = [sum(p for j, p in enumerate(row) if keep[b, h, i // 16, j // 16]) for i, row in enumerate(rows)]
        assert float(made[b, h]) == pytest.approx(sum(caught) / 56, rel=1e-5)


def test_recall_of_every_block_is_1(draw: Draw) -> None:
    grid = GRIDS[1]
    q, k, v = draw(2, 3, grid.tokens, 16)
    memory = run(EVERYTHING, grid, (q, k, v)).memory
    assert memory is not None
    assert torch.allclose(recall(q, k, memory.mask, SCALE), torch.ones(2, 3), atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [BlockSparse(), BlockSparse(order="hilbert"), BlockSparse(score="mass"), BlockSparse(score="antidiagonal")],
    ids=lambda settings: f"{settings.score} {settings.order}",
)
def test_more_blocks_never_catch_less(draw: Draw, settings: BlockSparse) -> None:
    grid = GRIDS[0]
    q, k, v = draw(2, 3, grid.tokens, 16)
    permutation = of(replace(settings, block_size=16), grid).permutation
    last = torch.zeros(2, 3)
    for density in (0.1, 0.3, 0.5, 0.65, 0.8):
        memory = run(replace(settings, block_size=16, density=density), grid, (q, k, v)).memory
        assert memory is not None
        caught = recall(q[:, :, permutation], k[:, :, permutation], memory.mask, SCALE)
        assert (caught >= last).all()
        last = caught
    assert 0.8 < float(last.mean()) < 1


def test_the_true_mass_catches_most(draw: Draw) -> None:
    q, k, v = draw(1, 4, 96, 16)
    caught = {}
    for score in ("mean", "mass"):
        memory = run(BlockSparse(0.34, score=score, keep=(), block_size=16), GRIDS[0], (2 * q, 2 * k, v)).memory
        assert memory is not None
        caught[score] = recall(2 * q, 2 * k, memory.mask, SCALE)
    assert (caught["mass"] >= caught["mean"] - 1e-6).all() and caught["mass"].mean() > caught["mean"].mean()
