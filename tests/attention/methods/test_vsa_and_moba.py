"""VSA and MoBA: the best means, and nothing else than what they name."""

from collections.abc import Callable

from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods import moba, vsa
from dit_accel.attention.search import search

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def best(q: Tensor, k: Tensor, count: int, size: int) -> list[set[int]]:
    """The `count` best blocks of each row, by the product of means, of tensors [S, D]."""
    means = [x.double().unflatten(0, (-1, size)).mean(1) for x in (q, k)]
    return [set(row.sort(descending=True).indices[:count].tolist()) for row in means[0] @ means[1].T]


def kept(rule: BlockSparse, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor) -> list[list[set[int]]]:
    layout = layout_of(grid, rule.order, rule.tile, rule.block_size)
    keep = search(rule, layout, q, k, v, scale=8**-0.5).mask.to_dense()[0]
    return [[{j for j, flag in enumerate(row) if flag} for row in head] for head in keep.tolist()]


def test_vsa_takes_the_best_tiles(draw: Draw) -> None:
    q, k, v = draw(1, 2, 8 * 8 * 12, 8)
    made = kept(vsa.settings(0.2), TokenGrid(8, 8, 12), q, k, v)
    for h in range(2):
        assert made[h] == best(q[0, h], k[0, h], 3, 64), "0.2 of 12 tiles, rounded up"
    layout = layout_of(TokenGrid(8, 8, 12), "tile", (4, 4, 4), 64)
    for block in layout.coordinates.reshape(-1, 64, 3):
        assert (block.amax(0) - block.amin(0)).tolist() == [3, 3, 3]


def test_moba_keeps_its_own_block_beside_the_best(draw: Draw) -> None:
    q, k, v = draw(1, 2, 16 * 128, 8)
    made = kept(moba.settings(), TokenGrid(1, 1, 2048), q, k, v)
    for h in range(2):
        assert made[h] == [found | {i} for i, found in enumerate(best(q[0, h], k[0, h], 3, 128))]
