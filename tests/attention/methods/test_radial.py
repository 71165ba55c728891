"""Radial Attention: widths by distance worked out by hand, masks against loops over tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.radial import PUBLISHED, sees, settings, widths
from dit_accel.attention.search import search


def test_widths_fall_with_the_distance() -> None:
    # frames of 1000 tokens (10 digits), blocks of 128; reach 1024 / 2^digits of the distance:
    # distance 1: 512, 2 and 3: 256, 4 to 7: 128, 8 to 15: 64, that is every second distance
    assert widths(10, 1000, 128, 1.0, 1) == [1000, 1000, 256, 256, 128, 128, 128, 128, 128, -1]
    assert widths(10, 1000, 128, 1.0, 0) == [1000, 500, 256, 256, 128, 128, 128, 128, 128, -1]
    # the decay narrows the window, but not below a block
    assert widths(5, 1000, 128, 0.75, 1) == [1000, 1000, 192, 192, 128]
    assert widths(5, 1000, 128, 0.2, 0) == [1000, 500, 128, 128, 128]
    # 16 to 31 reach 32: every fourth
    far = widths(24, 1000, 128, 1.0, 1)[16:]
    assert far == [128, -1, -1, -1, 128, -1, -1, -1]


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("whole", [0, 1])
def test_blocks_of_which_a_token_sees_a_token(order: str, whole: int) -> None:
    grid = TokenGrid(9, 6, 8, 10)
    layout = layout_of(grid, order, (4, 4, 4), 16)
    reach = widths(9, 48, 16, 0.5, whole)
    assert -1 in reach and 16 in reach
    expected = torch.zeros(layout.blocks, layout.blocks, dtype=torch.bool)
    places = layout.coordinates[: grid.image_tokens].tolist()
    for i, (f, r, c) in enumerate(places):
        for j, (g, s, d) in enumerate(places):
            if abs((r - s) * 8 + c - d) <= reach[abs(f - g)]:
                expected[i // 16, j // 16] = True
    assert torch.equal(sees(layout, 0.5, whole), expected)
    assert not expected.all()


def test_the_first_frame_and_text_are_seen_by_all(draw: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    rule = settings(0.5, block_size=16)
    layout = layout_of(TokenGrid(9, 6, 8, 16), rule.order, rule.tile, 16)  # three blocks a frame, one of text
    keep = search(rule, layout, *draw(1, 2, 448, 8), scale=1.0).mask.to_dense()[0, 0]
    assert keep[:, :3].all() and keep[:, -1].all() and keep[-1].all()
    assert torch.equal(keep[:-1, 3:-1], sees(layout, 0.5, 1)[:-1, 3:-1])
    assert float(keep.float().mean()) < 0.9


def test_published_numbers() -> None:
    wan, hunyuan = PUBLISHED["wan"].window, PUBLISHED["hunyuan-video"].window
    assert wan is not None and hunyuan is not None
    assert (wan.decay, wan.whole, hunyuan.decay, hunyuan.whole) == (0.2, 0, 0.95, 1)
