"""Sortblock's share and ranking, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.cache.indicator import similarity
from dit_accel.cache.methods.sortblock import FLUX_COEFFICIENTS, WAN_COEFFICIENTS
from dit_accel.cache.ranking import Ranking, least_similar, recompute_share


def test_the_published_polynomials_at_a_hundred() -> None:
    # FLUX: 5.67621e-4 - 1.36659e-2 + 0.116246 - 0.397725 + 0.361 + 0.56088
    assert recompute_share(Ranking(FLUX_COEFFICIENTS, 0.5), 100.0) == pytest.approx(0.5 * 0.627302721)
    # Wan at 0: its constant; at 100: -1.74367e-5 + 1.20871e-3 - 0.0211429 + 0.149777 - 0.453 + 0.4971
    wan = Ranking(WAN_COEFFICIENTS, 1.0)
    assert recompute_share(wan, 0.0) == 0.4971
    assert recompute_share(wan, 100.0) == pytest.approx(0.1739253733)


def test_the_share_stays_within_a_quantile() -> None:
    assert recompute_share(Ranking((2.0,), 1.0), 1.0) == 1.0
    assert recompute_share(Ranking((-2.0,), 1.0), 1.0) == 0.0


def test_similarity_looks_at_an_eighth_of_the_channels() -> None:
    full, forecast = torch.zeros(1, 2, 16), torch.zeros(1, 2, 16)
    full[..., 0], forecast[..., 0] = 1.0, 2.0  # the first token agrees: cosine 1
    forecast[0, 1, :2] = torch.tensor([0.0, 3.0])  # the second is at a right angle: 0
    full[..., 5], forecast[..., 5] = 9.0, -9.0  # not looked at
    assert similarity(full, forecast).item() == pytest.approx(0.5)


def test_similarity_of_few_channels_and_of_half_precision() -> None:
    # one channel at least: cosines 1 and -1
    few = torch.tensor([[[2.0, 5.0], [1.0, 5.0]]]), torch.tensor([[[3.0, -5.0], [-4.0, -5.0]]])
    assert similarity(*few).item() == pytest.approx(0.0)
    half = torch.full((1, 3, 8), 6e4, dtype=torch.float16)  # its square is more than fp16 holds
    assert similarity(half, half).item() == pytest.approx(1.0)


def test_ranking_by_hand() -> None:
    values = [0.9, 0.1, 0.5, 0.7, 0.3]  # sorted .1 .3 .5 .7 .9: the quantile .5 is .5, .25 is .3, .3 is .34
    assert least_similar(values, 0.5) == {1, 2, 4}
    assert least_similar(values, 0.25) == least_similar(values, 0.3) == {1, 4}
    assert least_similar(values, 0.0) == {1}, "as published one block is always at its own quantile"
    assert least_similar(values, 1.0) == {0, 1, 2, 3, 4}
    assert least_similar([0.9, math.nan, 0.5], 0.0) == {1, 2}
    assert least_similar([math.nan, math.nan], 0.0) == {0, 1}
