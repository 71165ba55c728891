"""AdaCache: rate, codebook and MoReg against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.cache.methods.adacache import (
    CODEBOOK_30_STEPS_FAST,
    CODEBOOK_30_STEPS_SLOW,
    CODEBOOK_100_STEPS,
    AdaCacheSettings,
    AdaCacheState,
    decide,
    gap_of,
    motion_factor,
    motion_score,
    observe,
    residual_change,
)


def replay(settings: AdaCacheSettings, changes: dict[int, float], steps: int) -> list[int]:
    """Numbers of the computed steps; changes: measured at them, but for the first."""
    state, computed = AdaCacheState(), []
    for step in range(steps):
        compute, state = decide(settings, state, step, steps)
        if compute:
            computed.append(step)
            state = observe(settings, state, step, [changes.get(step, 9.0)] if step else [])
    return computed


@pytest.mark.parametrize(("rate", "gap"), [(0.0, 12), (0.03, 10), (0.049, 10), (0.1, 4), (0.11, 3), (5.0, 3)])
def test_codebook_of_100_steps(rate: float, gap: int) -> None:
    assert gap_of(CODEBOOK_100_STEPS, rate) == gap


def test_codebooks_of_30_steps() -> None:
    assert [gap_of(CODEBOOK_30_STEPS_FAST, rate) for rate in (0.01, 0.1, 0.2, 0.3, 0.35, 0.5)] == [6, 5, 4, 3, 2, 1]
    assert [gap_of(CODEBOOK_30_STEPS_SLOW, rate) for rate in (0.01, 0.1, 0.2, 3.0)] == [3, 2, 1, 1]
    assert gap_of(CODEBOOK_100_STEPS, math.nan) == gap_of(CODEBOOK_100_STEPS, math.inf) == 1


def test_replay_by_hand() -> None:
    # step 0, gap 1 -> step 1: change .2 / 1 -> gap 4 (below .24) -> step 5: .2 / 4 = .05 -> gap 6 -> step 11:
    # .6 / 6 = .1 -> gap 5 -> step 16; of 20 steps the last two, 18 and 19, are computed as well
    changes = {1: 0.2, 5: 0.2, 11: 0.6, 16: 0.01}
    assert replay(AdaCacheSettings(CODEBOOK_30_STEPS_FAST), changes, 20) == [0, 1, 5, 11, 16, 18, 19]


def test_a_codebook_of_ones_never_skips() -> None:
    assert replay(AdaCacheSettings(((1.0, 1),)), dict.fromkeys(range(9), 0.0), 9) == list(range(9))


def test_the_rate_is_a_mean_over_layers() -> None:
    # (.2 + .6) / 2 / gap 2 = .2 -> below .24 -> 4
    state = observe(AdaCacheSettings(CODEBOOK_30_STEPS_FAST), AdaCacheState(7, 2), 7, [0.2, 0.6])
    assert state == AdaCacheState(11, 4)


def test_measures_by_hand() -> None:
    assert residual_change(torch.tensor([2.0, -2.0]), torch.tensor([1.0, -4.0])).item() == pytest.approx(3 / 5)
    # frames of two tokens: (1, 1), (3, 1): |2| + |0| over (3 + 1) + (1 + 1)
    residual = torch.tensor([[[1.0], [1.0], [3.0], [1.0]]])
    assert motion_score(residual, 2).item() == pytest.approx(2 / 6)


def test_motion_shortens_the_gap() -> None:
    settings = AdaCacheSettings(CODEBOOK_30_STEPS_FAST, motion=True)
    # score .385 is the neutral one: motion 1, no gradient
    assert motion_factor(settings, AdaCacheState(), 20, 0.385) == (1.0, 1.0)
    # twice that: 2^8 = 256, gradient 10 * (256 - 1) / gap 5 = 510
    assert motion_factor(settings, AdaCacheState(0, 5), 20, 0.77) == (pytest.approx(766.0), pytest.approx(256.0))
    # step 8 is the ninth, before the window
    assert motion_factor(settings, AdaCacheState(), 8, 0.77) == (1.0, 1.0)
    assert motion_factor(settings, AdaCacheState(), 9, 0.77)[1] == pytest.approx(256.0)
    still = observe(settings, AdaCacheState(20, 5), 20, [0.5], 0.385)  # .1 -> 5
    moving = observe(settings, AdaCacheState(20, 5), 20, [0.5], 0.77)
    assert (still.gap, moving.gap) == (5, 1)
    assert moving.motion == pytest.approx(256.0)
    assert observe(AdaCacheSettings(CODEBOOK_30_STEPS_FAST), AdaCacheState(20, 5), 20, [0.5], 0.77).gap == 5
