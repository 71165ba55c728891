"""BWCache: mean change, runs of skipped steps and the computed tail, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.cache.methods.bwcache import (
    OPEN_SORA,
    BwCacheSettings,
    BwCacheState,
    decide,
    mean_change,
    run_length,
)


def replay(settings: BwCacheSettings, change: float, steps: int) -> str:
    """Every computed step but the first measures the same change."""
    state, marks, measured = BwCacheState(), "", None
    for step in range(steps):
        compute, state = decide(settings, state, measured, step, steps)
        marks += "C" if compute else "."
        measured = change if compute and step else None
    return marks


def test_mean_change_by_hand() -> None:
    before = [torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])]
    now = [torch.tensor([1.5, 0.5]), torch.tensor([2.0, 2.4])]
    assert mean_change(now, before).item() == pytest.approx((0.5 + 0.1) / 2)


def test_length_of_a_run() -> None:
    assert [run_length(OPEN_SORA, steps) for steps in (4, 30, 50)] == [1, 3, 5]


def test_replay_by_hand() -> None:
    # 30 steps, runs of 3. Steps 0 and 1 are computed, 1 measures: 2, 3, 4 skipped, 5 computed, 6, 7, 8 skipped, ...
    # The first run begins with 28 steps left: the last 14 (from 16 on) are computed, so the run of 14, 15 and 16 is cut
    assert replay(OPEN_SORA, 0.1, 30) == "CC" + "...C" * 3 + ".." + "C" * 14
    assert replay(OPEN_SORA, 0.15, 30) == "C" * 30, "as large as the threshold is too large"
    assert replay(BwCacheSettings(0.0), 0.0, 30) == "C" * 30


def test_the_first_step_computes() -> None:
    assert decide(OPEN_SORA, BwCacheState(), None, 0, 30) == (True, BwCacheState())


@pytest.mark.parametrize("change", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(change: float | None) -> None:
    assert decide(OPEN_SORA, BwCacheState(0, 4), change, 8, 30) == (True, BwCacheState(0, 4))
