"""Sortblock: window, count, share and ranking, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.cache.methods.sortblock import (
    FLUX_COEFFICIENTS,
    WAN_COEFFICIENTS,
    SortblockSettings,
    SortblockState,
    decide,
    least_similar,
    observe,
    recompute_share,
    similarity,
)

SETTINGS = SortblockSettings(FLUX_COEFFICIENTS, interval=4, share=0.5, start=900.0, end=100.0)


def test_the_published_polynomials_at_a_hundred() -> None:
    # FLUX: 5.67621e-4 - 1.36659e-2 + 0.116246 - 0.397725 + 0.361 + 0.56088
    assert recompute_share(SETTINGS, 100.0) == pytest.approx(0.5 * 0.627302721)
    # Wan at 0: its constant; at 100: -1.74367e-5 + 1.20871e-3 - 0.0211429 + 0.149777 - 0.453 + 0.4971
    wan = SortblockSettings(WAN_COEFFICIENTS, 4, 1.0, 900.0, 100.0)
    assert recompute_share(wan, 0.0) == 0.4971
    assert recompute_share(wan, 100.0) == pytest.approx(0.1739253733)


def test_the_share_stays_within_a_quantile() -> None:
    assert recompute_share(SortblockSettings((2.0,), 4, 1.0, 900.0, 100.0), 1.0) == 1.0
    assert recompute_share(SortblockSettings((-2.0,), 4, 1.0, 900.0, 100.0), 1.0) == 0.0


def test_similarity_looks_at_an_eighth_of_the_channels() -> None:
    full, forecast = torch.zeros(1, 2, 16), torch.zeros(1, 2, 16)
    full[..., 0], forecast[..., 0] = 1.0, 2.0  # the first token agrees: cosine 1
    forecast[0, 1, :2] = torch.tensor([0.0, 3.0])  # the second is at a right angle: 0
    full[..., 5], forecast[..., 5] = 9.0, -9.0  # not looked at
    assert similarity(full, forecast).item() == pytest.approx(0.5)


def test_ranking_by_hand() -> None:
    values = [0.9, 0.1, 0.5, 0.7, 0.3]  # sorted .1 .3 .5 .7 .9: the quantile .5 is .5, .25 is .3, .3 is .34
    assert least_similar(values, 0.5) == {1, 2, 4}
    assert least_similar(values, 0.25) == least_similar(values, 0.3) == {1, 4}
    assert least_similar(values, 0.0) == {1}, "as published one block is always at its own quantile"
    assert least_similar(values, 1.0) == {0, 1, 2, 3, 4}
    assert least_similar([0.9, math.nan, 0.5], 0.0) == {1, 2}
    assert least_similar([math.nan, math.nan], 0.0) == {0, 1}


def test_replay_by_hand() -> None:
    everything, nothing, chosen = frozenset(range(5)), frozenset[int](), frozenset({1, 4})
    state, computed = SortblockState(), []
    for timestep in (950.0, 900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 99.0, 98.0):
        blocks, state = decide(SETTINGS, state, timestep, 5)
        computed.append(blocks)
        if not blocks:
            state = observe(state, chosen)
    # before the window; then full, forecast, chosen, chosen, full, forecast; then behind it
    assert computed == [everything, everything, nothing, chosen, chosen, everything, nothing, everything, everything]
    assert state == SortblockState()


def test_an_interval_of_one_is_always_full() -> None:
    settings, state = SortblockSettings(FLUX_COEFFICIENTS, 1, 0.5, 1000.0, 0.0), SortblockState()
    for timestep in (900.0, 500.0, 100.0):
        blocks, state = decide(settings, state, timestep, 3)
        assert blocks == {0, 1, 2}
