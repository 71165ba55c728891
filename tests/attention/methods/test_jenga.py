"""Jenga: its choice on a picture with text, replayed block by block."""

import math
from collections.abc import Callable

from torch import Tensor

from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.jenga import PUBLISHED, settings
from dit_accel.attention.search import search


def test_the_choice_of_every_row(draw: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    rule = settings(0.2, 0.55, block_size=16)
    layout = layout_of(TokenGrid(2, 12, 10, 24), rule.order, rule.tile, 16)  # blocks 0 to 14, then text in 15 and 16
    q, k, v = draw(1, 2, 264, 8)
    q = 3 * q
    made = search(rule, layout, q, k, v, scale=8**-0.5).mask.to_dense()
    image, counts = 15, set()
    for h in range(2):
        means = [[x[0, h, 16 * b : 16 * b + 16].double().mean(0) for b in range(image)] for x in (q, k)]
        for i in range(17):
            if i >= image:
                assert made[0, h, i].all(), "text sees all"
                continue
            weights = [math.exp(float(means[0][i] @ means[1][j]) * 8**-0.5) for j in range(image)]
            shares = sorted(((w / sum(weights), -j) for j, w in enumerate(weights)), reverse=True)
            summed, wanted = 0.0, 0
            while summed < 0.55:
                summed += shares[wanted][0]
                wanted += 1
            wanted = max(wanted, 3)  # 0.2 of 15 blocks
            counts.add(wanted)
            best = {-n for _, n in shares[:wanted]}
            near = {j for j in range(image) if layout.neighbours[i, j]}
            assert {j for j in range(17) if made[0, h, i, j]} == best | near | {15, 16}
    assert len(counts) > 1, "rows differ in what their probability asks for"


def test_published_numbers() -> None:
    base = PUBLISHED["hunyuan-video"]
    assert (base.density, base.top_p, base.block_size, base.order) == (0.25, 0.3, 128, "hilbert")
    assert PUBLISHED["wan"].top_p == 0.9 and PUBLISHED["hunyuan-video-flash"].density == 0.2
    assert set(base.keep) == {"text", "self", "neighbors"}
