"""SpeCa: error, threshold and the order of the checks, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dit_accel.cache.methods.speca import (
    PUBLISHED,
    SpecaSettings,
    SpecaState,
    decide,
    threshold_at,
    verification_error,
)

FLUX, DIT = PUBLISHED["flux"], PUBLISHED["dit-xl"]


def replay(settings: SpecaSettings, error_at: Callable[[int], float], steps: int) -> str:
    """error_at: what a forecast step measures, for the decision of the one after it."""
    state, marks, measured = SpecaState(), "", None
    for step in range(steps):
        compute, state = decide(settings, state, measured, step, steps)
        marks += "C" if compute else "."
        measured = None if compute else error_at(step)
    return marks


def test_the_error_is_relative_element_by_element() -> None:
    # 1/1, 1/4, 0/2; a ratio of means would be 2/7
    error = verification_error(torch.tensor([2.0, 5.0, -2.0]), torch.tensor([1.0, 4.0, -2.0]))
    assert error.item() == pytest.approx(1.25 / 3)
    zero = torch.zeros(2, dtype=torch.float16)
    assert verification_error(zero, zero).item() == 0.0


def test_the_threshold_decays_to_its_floor() -> None:
    assert threshold_at(FLUX, 0, 50) == 7.0
    assert threshold_at(FLUX, 25, 50) == pytest.approx(7 * math.sqrt(0.3))
    assert threshold_at(DIT, 50, 50) == pytest.approx(0.015)  # 0.3 * 0.05, above the floor
    assert threshold_at(SpecaSettings(0.3, 0.01, 0.01, 3, 8, 4), 50, 50) == 0.01


def test_replay_by_hand() -> None:
    # 0 and 2 are among the first three, 1 follows a computed step; then eight forecasts at most
    assert replay(FLUX, lambda step: 0.0, 22) == "C.C" + "." * 8 + "C" + "." * 8 + "C."
    # an error above every threshold: heeded after two forecasts
    assert replay(FLUX, lambda step: 9.0, 12) == "C.C..C..C..C"
    # one large error at step 6 of 20: the step stays, 7 is computed. There the threshold is 7 * .3^(7/20) = 4.59
    assert replay(FLUX, lambda step: 4.6 if step == 6 else 0.0, 10 + 10).startswith("C.C....C.")
    assert replay(FLUX, lambda step: 4.5 if step == 6 else 0.0, 20).startswith("C.C......")


def test_a_threshold_of_zero_leaves_the_shortest_run() -> None:
    strict = SpecaSettings(0.0, 1.0, 0.0, shortest=1, longest=8, order=1)
    assert replay(strict, lambda step: 1e-9, 8) == "C.C.C.C."


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_what_is_not_finite_computes(error: float) -> None:
    assert decide(FLUX, SpecaState(forecasts=2), error, 9, 50) == (True, SpecaState(computed=True))
    assert decide(FLUX, SpecaState(forecasts=1), error, 9, 50) == (False, SpecaState(forecasts=2))
