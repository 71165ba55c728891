"""DBCache: the order of its checks, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from dit_accel.cache import Schedule
from dit_accel.cache.gate import GateState, decide
from dit_accel.cache.methods.dbcache import FLUX_FAST, FLUX_MEDIUM, FLUX_SLOW, cache

Replay = Callable[..., str]


def test_defaults(replay: Replay) -> None:
    # eight steps of warm-up; then each change is judged alone: .07 passes, .08 does not; no last step is guarded
    assert replay(cache(), [0.0] * 8 + [0.07, 0.07, 0.08, 0.01]) == "C" * 8 + "..C."
    assert (cache().probe_blocks, cache().scope.last_blocks) == (8, 0)


def test_warm_up_with_an_interval(replay: Replay) -> None:
    # 0, 2, 4, 6 are computed, 1, 3, 5, 7 left to the threshold
    assert replay(FLUX_FAST, [0.1] * 10) == "C.C.C.C..."


def test_the_longest_run_is_ended_by_one_computed_step(replay: Replay) -> None:
    assert replay(FLUX_SLOW, [0.01] * 15) == "CCCC....C....C."
    assert replay(FLUX_MEDIUM, [0.01] * 15) == "CCCC......C...."


def test_the_mask_comes_beside_the_limits(replay: Replay) -> None:
    rule = cache(warmup=1, schedule=Schedule(mask="101000", most_skips=2))
    # 1 and 3 skipped; then no more may be, though the mask leaves 4 and 5 open
    assert replay(rule, [None] + [0.01] * 5) == "C.C.CC"
    # the mask says which steps may be skipped, and the threshold still says whether
    assert replay(rule, [None, 9.0, 0.01, 0.01, 9.0, 9.0]) == "CCC.CC"


def test_a_mask_of_another_length_is_stretched(replay: Replay) -> None:
    # cache-dit leaves the steps past the end of a mask open. Here ten steps take 0 .44 .89 1.3 1.8 2.2 2.7 3.1 3.6 4,
    # rounded 0 0 1 1 2 2 3 3 4 4, of five characters
    assert replay(cache(warmup=1, schedule=Schedule(mask="10100")), [0.01] * 10) == "CC..CC...."


def test_a_static_mask_skips_without_a_look(replay: Replay) -> None:
    static = replace(cache(warmup=1, schedule=Schedule(mask="10100")), threshold=None)
    assert replay(static, [None] + [9.0] * 4) == "C.C.."
    # in cache-dit a static mask skips before any limit is asked: here the limits hold all the same
    limited = replace(static, schedule=Schedule(mask="10100", most_skips=1))
    assert replay(limited, [None] + [9.0] * 4) == "C.CCC"
    # and it cuts the warm-up to the 1s that the mask begins with: here the warm-up goes on
    assert replay(replace(static, warmup=4), [None] + [9.0] * 4) == "CCCC."


def test_the_sum_of_changes_is_never_reset(replay: Replay) -> None:
    # .05 .10 -> from a sum of .1 on nothing is skipped; a change that was too large counts as well
    rule = cache(warmup=1, schedule=Schedule(most_change=0.1))
    assert replay(rule, [None] + [0.05] * 5) == "C..CCC"
    assert replay(rule, [None, 0.2, 0.01]) == "CCC"
    assert replay(cache(warmup=1), [None, 0.2, 0.01]) == "CC."


def test_a_change_that_is_no_number_is_not_summed(replay: Replay) -> None:
    # .05, nan, .10 -> computed. cache-dit adds what is above 0: an infinite change, but no nan
    rule = cache(warmup=1, schedule=Schedule(most_change=0.1))
    assert replay(rule, [None, 0.05, math.inf, 0.01, 0.01]) == "C.CCC"
    assert replay(rule, [None, 0.05, math.nan, 0.05, 0.01]) == "C.C.C"


def test_thresholds_at_the_ends(replay: Replay) -> None:
    assert replay(cache(0.0, warmup=1), [None] + [0.0] * 4) == "CCCCC"
    # in cache-dit a threshold of 1 or more is always passed, without a measurement; here it is one like any other
    assert replay(cache(1.0, warmup=1), [None, 0.9, 7.0]) == "C.C"


@pytest.mark.parametrize("change", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(change: float | None) -> None:
    assert decide(cache(warmup=1), GateState(skips=2, all_skips=2, all_change=0.1), change, 9).compute
