"""ProxyAttn: one ranking for a group of heads, a budget for each, against loops over tokens."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.proxyattn import scores, settings
from dit_accel.attention.score import Call
from dit_accel.attention.search import search
from dit_accel.errors import PolicyError

RULE = settings(2, 0.57, block_size=16)
Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]
MakeCall = Callable[..., Call]


def test_the_mean_head_ranks_by_its_largest_attention(
    draw: Draw, call: MakeCall, true_map: Callable[..., list[list[float]]]
) -> None:
    q, k, _ = draw(1, 4, 40, 8)
    made = scores(call(RULE, q, k)).probability[0]
    assert torch.equal(made[0], made[1]) and torch.equal(made[2], made[3]) and not torch.equal(made[1], made[2])
    for group in range(2):
        heads = slice(2 * group, 2 * group + 2)
        rows = true_map(q[0, heads].mean(0), k[0, heads].mean(0), 8**-0.5)
        for i in range(3):
            for j in range(3):
                block = max(max(row[16 * j : 16 * j + 16]) for row in rows[16 * i : 16 * i + 16])
                assert float(made[2 * group, i, j]) == pytest.approx(block, rel=1e-5)


def test_each_head_keeps_what_its_own_means_ask_for(draw: Draw, call: MakeCall) -> None:
    q, k, _ = draw(1, 4, 170, 8)
    q = q * torch.tensor([0.0, 2.0, 4.0, 12.0]).reshape(1, 4, 1, 1)  # from a head that is flat to one that is sharp
    k[:, :, 160:] = 5 * q[:, :, 150:160]  # of text, which is no part of the contest
    made = scores(call(RULE, q, k, grid=TokenGrid(1, 16, 10, 10)))
    assert made.counts is not None
    for h in range(4):
        for i in (0, 4, 9):
            query = q[0, h, 16 * i : 16 * i + 16].double().mean(0)
            weights = [
                math.exp(float(query @ k[0, h, 16 * j : 16 * j + 16].double().mean(0)) * 8**-0.5) for j in range(10)
            ]
            summed, wanted = 0.0, 0
            while summed < 0.57 * sum(weights):
                summed += sorted(weights, reverse=True)[wanted]
                wanted += 1
            assert int(made.counts[0, h, i]) == wanted
    assert float(made.counts[0, 0].float().mean()) > float(made.counts[0, 3].float().mean())


def test_the_shared_best_are_kept_in_each_heads_number(draw: Draw, call: MakeCall) -> None:
    q, k, v = draw(1, 4, 170, 8)
    layout = layout_of(TokenGrid(1, 16, 10, 10), "raster", (4, 4, 4), 16)  # 10 blocks, one of text
    mask = search(RULE, layout, q, k, v, scale=8**-0.5).mask.to_dense()
    made = scores(call(RULE, q, k, grid=layout.grid))
    assert made.counts is not None
    for h in range(4):
        for i in range(10):
            ranked = sorted(range(10), key=lambda j: -float(made.probability[0, h, i, j]))
            assert {j for j in range(11) if mask[0, h, i, j]} == {*ranked[: int(made.counts[0, h, i])], i, 10}


def test_a_key_bias_hides_keys_from_the_ranking(draw: Draw, call: MakeCall) -> None:
    q, k, _ = draw(1, 4, 48, 8)
    bias = torch.zeros(1, 4, 48)
    bias[..., 16:32] = -math.inf
    bias[:, 1::2, 32:] = -math.inf  # from one head of each group alone
    made = scores(call(RULE, q, k, key_bias=bias)).probability
    assert not made[..., 1].any() and made[..., 2].all()


def test_groups_must_divide_the_heads(draw: Draw, call: MakeCall) -> None:
    q, k, _ = draw(1, 3, 48, 8)
    with pytest.raises(PolicyError, match="groups is 2, but there are 3 heads; give a divisor of 3"):
        scores(call(RULE, q, k))
