"""DBCache: the order of its checks, worked out by hand."""

from __future__ import annotations

import math

import pytest

from dit_accel.cache.methods.dbcache import FLUX_FAST, FLUX_SLOW, DbCacheSettings, DbCacheState, decide


def replay(settings: DbCacheSettings, changes: list[float | None]) -> str:
    state, marks = DbCacheState(), ""
    for step, change in enumerate(changes):
        compute, state = decide(settings, state, change, step)
        marks += "C" if compute else "."
    return marks


def test_defaults() -> None:
    # eight steps of warm-up; then each change is judged alone: .07 passes, .08 does not; no last step is guarded
    assert replay(DbCacheSettings(), [0.0] * 8 + [0.07, 0.07, 0.08, 0.01]) == "C" * 8 + "..C."


def test_warm_up_with_an_interval() -> None:
    # 0, 2, 4, 6 are computed, 1, 3, 5, 7 left to the threshold
    assert replay(FLUX_FAST, [0.1] * 10) == "C.C.C.C..."


def test_the_longest_run_is_ended_by_one_computed_step() -> None:
    assert replay(FLUX_SLOW, [0.01] * 15) == "CCCC....C....C."


def test_the_mask_comes_before_the_limits() -> None:
    mask = (1, 0, 1, 0, 0)
    settings = DbCacheSettings(warmup=0, mask=mask, most_skips=2)
    # 1 and 3 skipped; then no more may be, though the mask leaves 4 and (past its end) 5 open
    assert replay(settings, [None] + [0.01] * 5) == "C.C.CC"
    static = DbCacheSettings(warmup=0, mask=mask, static_mask=True, most_skips=0)
    assert replay(static, [None] + [9.0] * 4) == "C.C.."
    warm = DbCacheSettings(warmup=4, mask=mask, static_mask=True)
    assert replay(warm, [None] + [9.0] * 4) == "C.C..", "the mask cuts the warm-up short"


def test_the_sum_of_changes_is_never_reset() -> None:
    # .05 .10 -> from a sum of .1 on nothing is skipped; a change that was too large counts as well
    settings = DbCacheSettings(warmup=1, most_change=0.1)
    assert replay(settings, [None] + [0.05] * 5) == "C..CCC"
    assert replay(settings, [None, 0.2, 0.01]) == "CCC"
    assert replay(DbCacheSettings(warmup=1), [None, 0.2, 0.01]) == "CC."


def test_thresholds_at_the_ends() -> None:
    assert replay(DbCacheSettings(0.0, warmup=0), [None] + [0.0] * 4) == "CCCCC"
    always = decide(DbCacheSettings(1.0, warmup=0), DbCacheState(), 7.0, 3)
    assert always == (False, DbCacheState(1, 1, 0.0)), "nothing is measured, so nothing is summed"


@pytest.mark.parametrize("change", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(change: float | None) -> None:
    assert decide(DbCacheSettings(warmup=0), DbCacheState(2, 2, 0.1), change, 9) == (True, DbCacheState(2, 0, 0.1))
