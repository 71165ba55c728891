"""The gate on short traces worked out by hand, alone and together with the schedule."""

from __future__ import annotations

import math

import pytest

from dit_accel.cache import BlockCache
from dit_accel.cache.gate import GateState, Verdict, after_skip, decide
from dit_accel.cache.schedule import must_compute


def replay(cache: BlockCache, indicators: list[float | None], steps: int | None = None) -> str:
    """One letter a step: C computed, s skipped. steps: the length of the run, where it is known."""
    state, letters = GateState(), ""
    for seen, indicator in enumerate(indicators):
        forced = must_compute(cache, seen, None if steps is None else steps - seen, state.skips)
        verdict = Verdict(True, forced) if forced else decide(cache, state, indicator)
        state = GateState() if verdict.compute else after_skip(state, verdict)
        letters += "C" if verdict.compute else "s"
    return letters


TRACE = [9.0, 0.04, 0.04, 0.04, 0.09, 0.02, 0.12, 0.02]


@pytest.mark.parametrize(
    ("settings", "letters"),
    [
        # FBCache: each step alone, against the last computed one; 0.12 is the only one at or over 0.1
        ({"threshold": 0.1}, "CsssssCs"),
        # TeaCache: sums 0.04, 0.08, 0.12 -> compute; 0.09, 0.11 -> compute; 0.12 -> compute; 0.02
        ({"threshold": 0.1, "accumulate": True}, "CssCsCCs"),
        ({"threshold": 0.1, "max_skips": 2}, "CssCssCs"),
        ({"threshold": 0.1, "max_skips": 1}, "CsCsCsCs"),
        ({"threshold": 0.1, "max_skips": 0}, "CCCCCCCC"),
        ({"threshold": 0.1, "warmup": 4}, "CCCCssCs"),
        # the sum starts anew behind every computed step: 0.04, 0.13 -> compute, 0.02, 0.14 -> compute, 0.02
        ({"threshold": 0.1, "warmup": 3, "accumulate": True}, "CCCsCsCs"),
        ({"threshold": 0.0}, "CCCCCCCC"),
        ({"threshold": 0.0, "accumulate": True}, "CCCCCCCC"),
        ({"threshold": 100.0}, "Csssssss"),
        ({"threshold": None, "max_skips": 2}, "CssCssCs"),
        ({"threshold": None, "max_skips": 2, "warmup": 3}, "CCCssCss"),
    ],
)
def test_decisions_on_a_trace(settings: dict, letters: str) -> None:
    cache = BlockCache(**{"warmup": 1, "tail": 0, "max_skips": None} | settings)
    assert replay(cache, list(TRACE)) == letters


@pytest.mark.parametrize(
    ("tail", "steps", "letters"),
    [
        (0, 8, "Csssssss"),
        (1, 8, "CssssssC"),
        (3, 8, "CssssCCC"),
        (3, None, "Csssssss"),  # unknown length: nothing is known to be the end
        (9, 8, "CCCCCCCC"),
        (1, 6, "CssssCCC"),  # longer than announced
    ],
)
def test_the_tail_is_computed_where_the_end_is_known(tail: int, steps: int | None, letters: str) -> None:
    cache = BlockCache(threshold=1.0, warmup=1, tail=tail, max_skips=None)
    assert replay(cache, [0.0] * 8, steps) == letters


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("indicator", [math.nan, math.inf, -math.inf])
def test_an_indicator_that_is_no_number_computes(indicator: float, accumulate: bool) -> None:
    verdict = decide(BlockCache(threshold=1e9, accumulate=accumulate), GateState(), indicator)
    assert verdict.compute and verdict.reason == "non-finite indicator"


def test_a_threshold_without_an_indicator_computes() -> None:
    assert decide(BlockCache(threshold=1e9), GateState(), None) == Verdict(True, "no indicator")


def test_a_schedule_asks_for_no_indicator() -> None:
    assert decide(BlockCache(threshold=None), GateState(), None) == Verdict(False, "schedule")


def test_the_value_held_against_the_threshold_is_told() -> None:
    state = GateState(accumulated=0.25, skips=2)
    assert decide(BlockCache(threshold=0.5), state, 0.125) == Verdict(False, "below threshold", 0.125)
    assert decide(BlockCache(threshold=0.5, accumulate=True), state, 0.125) == Verdict(False, "below threshold", 0.375)
    assert decide(BlockCache(threshold=0.5, accumulate=True), state, 0.25) == Verdict(True, "above threshold", 0.5)


def test_the_sum_and_the_number_of_skips_are_carried() -> None:
    state = GateState(accumulated=0.25, skips=2)
    assert after_skip(state, Verdict(False, "below threshold", 0.375)) == GateState(0.375, 3, all_skips=1)
    assert after_skip(state, Verdict(False, "schedule")) == GateState(0.25, 3, all_skips=1)
