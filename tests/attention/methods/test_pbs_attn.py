"""PBS-Attn: heavy keys gathered in few blocks, so that fewer blocks hold the same mass."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.pbs_attn import settings
from dit_accel.attention.recall import recall
from dit_accel.attention.search import search, sorted_by

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def scattered(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Every eighth key weighs much for every query."""
    q, k, v = draw(1, 2, 256, 8)
    q[..., 0], k[..., 0] = 5.0, 0.0
    k[:, :, ::8, 0] = 5.0
    return q, k, v


def test_sorting_finds_the_same_mass_in_fewer_blocks(draw: Draw) -> None:
    q, k, v = scattered(draw)
    layout = layout_of(TokenGrid(1, 1, 256), "raster", (4, 4, 4), 16)
    rule = settings(0.9, segment=128, block_size=16)
    bare = replace(rule, keep=())
    plain, made = (search(s, layout, q, k, v, scale=8**-0.5) for s in (replace(bare, sort=None), bare))
    assert made.mask.density < plain.mask.density / 2
    assert made.key_order is not None
    caught = recall(q, sorted_by(made.key_order, k), made.mask, 8**-0.5)
    assert float(caught.min()) > 0.85
    # in each segment of 128 the 16 heavy keys come first, in one block
    assert all(n % 8 == 0 for order in made.key_order[0].tolist() for n in (*order[:16], *order[128:144]))


def test_the_own_segment_and_the_first_key_are_kept(draw: Draw) -> None:
    q, k, v = draw(1, 2, 256, 8)
    layout = layout_of(TokenGrid(1, 1, 256), "raster", (4, 4, 4), 16)
    keep = search(settings(0.0, segment=64, block_size=16), layout, q, k, v, scale=8**-0.5).mask.to_dense()
    for i in range(16):
        start = i // 4 * 4
        assert keep[:, :, i, start : start + 4].all()
        assert ((keep[:, :, i].sum(-1) >= 4) & (keep[:, :, i].sum(-1) <= 6)).all(), "the best, the first key's block"


def test_published_numbers() -> None:
    rule = settings()
    assert rule.sort is not None and (rule.sort.segment, rule.block_size, rule.top_p) == (256, 128, 0.9)
