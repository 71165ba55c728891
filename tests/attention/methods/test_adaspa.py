"""AdaSpa: the mass of blocks against attention written out, and the LSE that later searches use again."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_accel.attention.attend import attend
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.adaspa import scores, settings
from dit_accel.attention.recall import recall
from dit_accel.attention.search import Memory, search

RULE = replace(settings(0.3), block_size=16)
Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def test_mass_is_the_true_share_of_attention(
    draw: Draw, call: Callable[..., object], true_map: Callable[..., list[list[float]]]
) -> None:
    q, k, _ = draw(2, 2, 40, 8)
    bias = torch.zeros(2, 1, 40)
    bias[1, :, 30:] = -math.inf
    made = scores(call(RULE, q, k, key_bias=bias))
    assert made.lse is not None
    for b, h in ((0, 1), (1, 0)):
        rows = true_map(q[b, h], k[b, h], 8**-0.5, bias[b, 0])
        for i, j in ((0, 0), (1, 2), (2, 1), (2, 2)):  # the last block holds 8 tokens
            block = [sum(row[16 * j : 16 * j + 16]) for row in rows[16 * i : 16 * i + 16]]
            assert float(made.probability[b, h, i, j]) == pytest.approx(sum(block) / len(block), rel=1e-5, abs=1e-7)
    plain = torch.logsumexp(q @ k.mT * 8**-0.5 + bias.unsqueeze(-2), -1)
    assert torch.allclose(made.lse, plain, atol=1e-5)


def test_a_row_that_sees_nothing_has_no_mass(draw: Draw, call: Callable[..., object]) -> None:
    q, k, _ = draw(1, 1, 40, 8)
    made = scores(call(RULE, q, k, key_bias=torch.full((1, 1, 40), -math.inf)))
    assert not made.probability.any()
    memory = replace(search_of(draw), lse=made.lse)
    assert not scores(call(RULE, q, k, key_bias=torch.full((1, 1, 40), -math.inf), memory=memory)).probability.any()


def search_of(draw: Draw) -> Memory:
    layout = layout_of(TokenGrid(1, 1, 40), RULE.order, RULE.tile, 16)
    return search(RULE, layout, *draw(1, 1, 40, 8), scale=8**-0.5)


def test_the_first_lse_serves_later_searches(draw: Draw) -> None:
    rule = replace(RULE, search_steps=(2, 4))
    layout = layout_of(TokenGrid(1, 1, 80), rule.order, rule.tile, 16)
    first = draw(1, 4, 80, 8)
    memory, searched, sums = None, [], []
    for step in range(6):
        q, k, v = first if step < 2 else draw(1, 4, 80, 8, seed=step)
        made = attend(rule, layout, q, k, v, scale=8**-0.5, memory=memory, step=step)
        memory = made.memory
        assert memory is not None and memory.lse is not None
        searched.append(made.searched)
        sums.append(memory.lse)
    assert searched == [True, False, True, False, True, False]
    assert all(torch.equal(lse, sums[0]) for lse in sums)
    q, k, _ = first
    assert torch.allclose(sums[0], torch.logsumexp(q @ k.mT * 8**-0.5, -1), atol=1e-5)


def test_a_stale_lse_scales_masses_and_keeps_their_ranks(draw: Draw, call: Callable[..., object]) -> None:
    q, k, _ = draw(1, 1, 40, 8)
    fresh = scores(call(RULE, q, k))
    assert fresh.lse is not None
    memory = replace(search_of(draw), lse=fresh.lse + math.log(2))
    again = scores(call(RULE, q, k, memory=memory)).probability
    assert torch.allclose(2 * again, fresh.probability, atol=1e-6)


def test_heads_that_keep_enough_give_blocks_to_those_that_lose_most(draw: Draw) -> None:
    q, k, v = draw(1, 4, 160, 8)
    q[0, 0] = 0.0  # a head that looks everywhere
    for h, sharpness in ((1, 1.0), (2, 3.0), (3, 8.0)):
        q[0, h] = sharpness * k[0, h]  # heads that look at one place
    rule = replace(RULE, keep=(), density=0.4)
    layout = layout_of(TokenGrid(1, 1, 160), rule.order, rule.tile, 16)
    shared = recall(q, k, search(replace(rule, budget="shared"), layout, q, k, v, scale=1.0).mask, 1.0)[0]
    assert float(shared[0]) < 0.8 < float(shared[2])
    counts = search(rule, layout, q, k, v, scale=1.0).mask.counts[0]
    assert counts.float().mean(-1)[[0, 3]].tolist() == [6, 2] and float(counts.float().mean()) == 4.0
