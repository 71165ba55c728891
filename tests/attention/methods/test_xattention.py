"""XAttention: sums along antidiagonals, score by score."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.xattention import scores, settings
from dit_accel.attention.score import Call
from dit_accel.attention.search import search

RULE = settings(0.9, stride=4, block_size=16)
Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def reference(
    q: Tensor, k: Tensor, scale: float, bias: list[float], stride: int = 4, size: int = 16
) -> list[list[float]]:
    """Mean score of each antidiagonal of a stride x stride square and mean bias of the square's keys; softmax over
    squares, summed over blocks."""
    tokens = len(q)
    squares, blocks = -(-tokens // stride), -(-tokens // size)
    made = [[0.0] * blocks for _ in range(blocks)]
    for i in range(squares):
        weights: list[float] = []
        for j in range(squares):
            pairs = [(i * stride + stride - 1 - s, j * stride + s) for s in range(stride)]
            shown = [n for n in range(j * stride, min(j * stride + stride, tokens)) if bias[n] > -math.inf]
            pairs = [(a, b) for a, b in pairs if a < tokens and b in shown]
            mean = sum(float(q[a] @ k[b]) * scale for a, b in pairs) / max(len(pairs), 1)
            weights.append(math.exp(mean + sum(bias[n] for n in shown) / len(shown)) if shown else 0.0)
        for j, weight in enumerate(weights):
            made[i * stride // size][j * stride // size] += weight / sum(weights)
    return made


@pytest.mark.parametrize("tokens", [32, 48, 41, 45])
@pytest.mark.parametrize("biased", [{}, {3: -math.inf, 4: 2.0, 5: -1.0, **dict.fromkeys(range(20, 24), -math.inf)}])
def test_sums_of_antidiagonals(draw: Draw, call: Callable[..., Call], tokens: int, biased: dict[int, float]) -> None:
    q, k, _ = draw(2, 2, tokens, 8)
    bias = torch.tensor([biased.get(n, 0.0) for n in range(tokens)])
    made = scores(call(RULE, q, k, key_bias=bias.reshape(1, 1, -1) if biased else None)).probability
    for b, h in ((0, 0), (1, 1)):
        expected = reference(q[b, h].double(), k[b, h].double(), 8**-0.5, bias.tolist())
        assert made[b, h].tolist() == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in expected]


def test_chunks_make_no_difference(draw: Draw, call: Callable[..., Call], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = draw(2, 2, 90, 8)
    whole = scores(call(RULE, q, k)).probability
    monkeypatch.setattr("dit_accel.attention.score.CHUNK", 1)
    assert torch.allclose(scores(call(RULE, q, k)).probability, whole, atol=1e-6)


def test_the_fewest_blocks_that_hold_top_p(draw: Draw, call: Callable[..., Call]) -> None:
    q, k, v = draw(1, 2, 160, 8)
    layout = layout_of(TokenGrid(1, 1, 160), RULE.order, RULE.tile, 16)
    keep = search(RULE, layout, 3 * q, k, v, scale=8**-0.5).mask.to_dense()
    made = scores(call(RULE, 3 * q, k)).probability
    for h in range(2):
        for i in range(10):
            shares = (made[0, h, i] / made[0, h, i].sum()).tolist()
            ranked = sorted(range(10), key=lambda j: -shares[j])
            wanted = next(n for n in range(1, 11) if sum(shares[j] for j in ranked[:n]) >= 0.9)
            assert {j for j in range(10) if keep[0, h, i, j]} == {*ranked[:wanted], i, 0}
