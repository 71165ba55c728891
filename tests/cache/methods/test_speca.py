"""SpeCa: error, threshold and the order of the checks, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dit_accel.cache import BlockCache
from dit_accel.cache.gate import GateState, decide, threshold_at
from dit_accel.cache.indicator import elementwise_change
from dit_accel.cache.methods.speca import PUBLISHED, cache, forecast

Replay = Callable[..., str]

FLUX, DIT = (cache(*PUBLISHED[model][:5]) for model in ("flux", "dit-xl"))


def marks_of(replay: Replay, rule: BlockCache, error_at: Callable[[int], float], steps: int) -> str:
    """error_at: what a forecast step measures, for the decision of the one after it."""

    def error(step: int, was_computed: bool) -> float | None:
        return None if was_computed or not step else error_at(step - 1)

    return replay(rule, error, steps=steps)


def test_the_error_is_relative_element_by_element() -> None:
    # 1/1, 1/4, 0/2; a ratio of means would be 2/7
    error = elementwise_change(torch.tensor([2.0, 5.0, -2.0]), torch.tensor([1.0, 4.0, -2.0]))
    assert error.item() == pytest.approx(1.25 / 3)
    zero = torch.zeros(2, dtype=torch.float16)
    assert elementwise_change(zero, zero).item() == 0.0


def test_the_threshold_decays_to_its_floor() -> None:
    assert threshold_at(FLUX, 0, 50) == 7.0
    assert threshold_at(FLUX, 25, 50) == pytest.approx(7 * math.sqrt(0.3))
    assert threshold_at(DIT, 50, 50) == pytest.approx(0.015)  # 0.3 * 0.05, above the floor
    assert threshold_at(cache(0.3, 0.01, 0.01, 3, 8), 50, 50) == 0.01
    assert threshold_at(FLUX, 25, None) == 7.0, "nothing decays over a run of unknown length"


def test_replay_by_hand(replay: Replay) -> None:
    # 0, 1 and 2 are the first three (as published 1, behind a computed step, is forecast: C.C); then eight forecasts at
    # most
    assert marks_of(replay, FLUX, lambda step: 0.0, 22) == "CCC" + "." * 8 + "C" + "." * 8 + "C."
    # an error above every threshold: heeded after two forecasts
    assert marks_of(replay, FLUX, lambda step: 9.0, 12) == "CCC..C..C..C"
    # one large error at step 6 of 20: the step stays, 7 is computed. There the threshold is 7 * .3^(7/20) = 4.59
    assert marks_of(replay, FLUX, lambda step: 4.6 if step == 6 else 0.0, 20).startswith("CCC....C.")
    assert marks_of(replay, FLUX, lambda step: 4.5 if step == 6 else 0.0, 20).startswith("CCC......")


def test_at_least_three_forecasts_on_dit(replay: Replay) -> None:
    assert marks_of(replay, DIT, lambda step: 9.0, 12) == "CCC...C...C."


def test_a_threshold_of_zero_leaves_the_shortest_run(replay: Replay) -> None:
    strict = cache(0.0, 1.0, 0.0, shortest=1, longest=8, first=1)
    assert marks_of(replay, strict, lambda step: 1e-9, 8) == "C.C.C.C."


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_what_is_not_finite_computes(error: float) -> None:
    assert decide(FLUX, GateState(skips=2), error, 9, 50).compute
    # within the shortest run as well, where the published code heeds nothing
    assert decide(FLUX, GateState(skips=1), error, 9, 50).compute
    assert not decide(FLUX, GateState(skips=1), 9.0, 9, 50).compute


def test_the_last_block_runs_on_the_forecast() -> None:
    assert (FLUX.signal.of, FLUX.scope.last_blocks, FLUX.scope.carrier) == ("last block", 1, "output")
    assert [forecast(found[5]).anchors for found in PUBLISHED.values()] == [3, 5]
