"""SpargeAttn: likeness of blocks, and what is kept where tokens differ."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.spargeattn import BY_COUNT, likeness, scores, settings
from dit_accel.attention.score import Call, mean_scores
from dit_accel.attention.search import search

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def test_likeness_is_the_mean_of_all_products(draw: Draw) -> None:
    x = draw(1, 1, 21, 4)[0]
    made = likeness(x, 16)[0, 0].tolist()
    units = [row / row.norm() for row in x[0, 0].double()]
    for block, span in enumerate((range(16), range(16, 21))):
        products = [float(units[i] @ units[j]) for i in span for j in span]
        assert made[block] == pytest.approx(sum(products) / len(products), abs=1e-6)
    assert likeness(torch.ones(1, 1, 16, 4), 16).item() == pytest.approx(1.0)
    opposite = torch.cat([torch.ones(8, 4), -torch.ones(8, 4)])[None, None]
    assert likeness(opposite, 16).item() == pytest.approx(0.0, abs=1e-6)


def blocks_of_one_kind(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Four blocks, in each of which all tokens are nearly alike."""
    q, k, v = draw(1, 1, 64, 8)
    kinds = torch.eye(4, 8).repeat_interleave(16, 0)
    return 0.01 * q + 3 * kinds, 0.01 * k + 3 * kinds, v


def test_blocks_that_are_alike_compete_by_their_means(draw: Draw, call: Callable[..., Call]) -> None:
    q, k, _ = blocks_of_one_kind(draw)
    rule = replace(settings(0.6), block_size=16)
    made = scores(call(rule, q, k))
    assert made.forced is not None and not made.forced.any()
    assert torch.allclose(made.probability, mean_scores(call(rule, q, k)).probability, atol=1e-6)


def test_blocks_that_are_not_alike_are_kept_whole(draw: Draw, call: Callable[..., Call]) -> None:
    q, k, v = blocks_of_one_kind(draw)
    noise, _, _ = draw(1, 1, 16, 8, seed=7)
    q[:, :, 16:32] = noise  # queries of block 1
    k[:, :, 32:48] = noise.flip(2)  # keys of block 2
    rule = replace(settings(0.6, top_p=0.5), block_size=16)
    made = scores(call(rule, q, k))
    assert made.forced is not None
    assert made.forced[0, 0].int().tolist() == [[int(i == 1 or j == 2) for j in range(4)] for i in range(4)]
    assert not made.probability[..., 2].any(), "out of the softmax"
    layout = layout_of(TokenGrid(1, 1, 64), rule.order, rule.tile, 16)
    keep = search(rule, layout, q, k, v, scale=1.0).mask.to_dense()[0, 0].int().tolist()
    assert [keep[i] for i in (0, 1, 3)] == [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert sum(keep[2]) == 3 and keep[2][2], "its like is out of the contest, and of the others half take two"


def test_the_mean_key_is_taken_off_before_keys_are_compared(draw: Draw, call: Callable[..., Call]) -> None:
    q, _, _ = blocks_of_one_kind(draw)
    noise = draw(1, 1, 64, 8, seed=7)[0]
    rule = replace(settings(0.6), block_size=16)
    shifted = noise + 50.0  # all alike, but only for what they share
    assert float(likeness(shifted, 16).min()) > 0.9
    forced = scores(call(rule, q, shifted)).forced
    assert forced is not None and forced.all()


def test_published_numbers() -> None:
    assert (settings().similarity, settings().top_p) == (0.6, 0.98)
    assert (BY_COUNT.similarity, BY_COUNT.density, BY_COUNT.top_p) == (-0.1, 0.5, None)
