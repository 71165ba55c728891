"""MagCache replayed on short tables of ratios, with the sums in the comments."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.cache.methods.magcache import (
    FLUX_RATIOS,
    PUBLISHED,
    MagCache,
    MagState,
    decide,
    magnitude_ratios,
    nearest_ratios,
    schedule,
)
from dit_accel.cache.methods.mask import steps_of
from dit_accel.errors import PolicyError

EIGHT = [1.0, 1.5, 1.02, 1.02, 0.98, 0.95, 1.0, 0.99]


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        # 1: |1 - 1.5| > .1 -> computed. 2: R 1.02, E .02; 3: R 1.0404, E .0604; 4: R 1.0196, E .08 -> three skips;
        # 5: n = 4 > 3 -> computed. 6: R 1, E 0; 7: R .99, E .01 -> skipped
        (MagCache(0.1, 3, 0.0), [0, 1, 5]),
        # 5, without a limit: R 1.01959 x .95 = .96861, E .07999 + .03139 = .1114 > .1 -> computed all the same
        (MagCache(0.1, 9, 0.0), [0, 1, 5]),
        # 5 fits now, E .1114; 6: R .96861, E .1428; 7: R .95893, E .1838
        (MagCache(0.19, 9, 0.0), [0, 1]),
        # 1 skipped at last: R 1.5, E .5; 2: R 1.53, E 1.03 > .6 -> computed; from there E stays below
        (MagCache(0.6, 9, 0.0), [0, 2]),
        # 3 first: R 1.02, E .02; 4: R .9996, E .0204; 5: .94962, E .0708; 6: n = 4 -> computed; 7: E .01
        (MagCache(0.1, 3, 0.375), [0, 1, 2, 6]),
        # step 4 of 8 forced: 2, 3 skipped; 4; 5: R .95, E .05; 6: R .95, E .1 (just), 7: R .9405, E .1595 -> computed
        (MagCache(0.1001, 3, 0.0, forced=(4, 8)), [0, 1, 4, 7]),
        (MagCache(0.1, 0, 0.0), list(range(8))),
        (MagCache(0.0, 3, 0.0), list(range(8))),
        (MagCache(0.1, 3, 1.0), list(range(8))),
    ],
)
def test_a_run_by_hand(settings: MagCache, computed: list[int]) -> None:
    assert steps_of(schedule(settings, EIGHT)) == computed


def test_the_state_is_handed_back_and_starts_anew_behind_a_computed_step() -> None:
    settings = MagCache(0.1, 2, 0.2)
    compute, state = decide(settings, MagState(), 1.02, 5, 20)
    assert (compute, state.skips) == (False, 1)
    assert (state.ratio, state.error) == pytest.approx((1.02, 0.02))
    compute, state = decide(settings, state, 1.02, 6, 20)
    assert not compute
    assert (state.ratio, state.error) == pytest.approx((1.0404, 0.0604))
    assert decide(settings, state, 1.0, 7, 20) == (True, MagState())


def test_threshold_zero_never_skips_and_neither_does_a_ratio_that_is_no_number() -> None:
    assert all(schedule(MagCache(0.0, 9, 0.0), [1.0] * 6))
    assert all(schedule(MagCache(9.0, 9, 0.0), [math.nan] * 6))
    assert schedule(MagCache(), [1.0]) == (True,)


def test_ratios_are_means_over_tokens_of_ratios_of_norms() -> None:
    residuals = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[6.0, 8.0], [1.0, 0.0]], [[3.0, 4.0], [0.0, 0.5]]])
    # norms 5 1, 10 1, 5 .5: ratios (2 + 1) / 2 and (.5 + .5) / 2
    assert magnitude_ratios(residuals) == [1.0, 1.5, 0.5]


def test_a_table_is_stretched_to_the_nearest_place() -> None:
    # 3 to 5: places 0, .5, 1, 1.5, 2; halves are rounded to even as numpy does
    assert nearest_ratios([1.0, 2.0, 3.0], 5) == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert nearest_ratios([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [1.0, 3.0, 5.0]
    assert nearest_ratios(FLUX_RATIOS, 28) == list(FLUX_RATIOS)
    assert nearest_ratios([1.0, 2.0], 1) == [2.0]


def test_the_published_settings_for_flux() -> None:
    assert len(FLUX_RATIOS) == 28
    # .1 x 28 rounds to 3. 3: R 1.07812, E .078; 4: R 1.1455, E .2236; 5: 1.1902 -> computed. 6: E .03125;
    # 7: R 1.0715, E .1028; 8: R 1.0966, E .1994; 9: E .33 -> computed. 10: E .023; 11 is forced. 12: E .0156;
    # 13: R 1.0236, E .0392; 14: E .0627; 15: R 1.0315, E .0943; 16: E .1258; 17 is the sixth -> computed.
    # 18, 19: E 0; 20: .0039; 21: R .9922, E .0117; 22: R .9728, E .0389; 23 is the sixth -> computed.
    # 24: E .0352; 25: R .9234, E .1118; 26: R .8621, E .2497 -> computed. 27: E .1094
    assert steps_of(schedule(PUBLISHED["flux"], FLUX_RATIOS)) == [0, 1, 2, 5, 9, 11, 17, 23, 26]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(PolicyError, match="threshold is nan"):
        MagCache(math.nan)
    with pytest.raises(PolicyError, match="max_skips is -1"):
        MagCache(max_skips=-1)
    with pytest.raises(PolicyError, match=r"retention is 1\.5"):
        MagCache(retention=1.5)
    with pytest.raises(PolicyError, match="at least 2 steps"):
        MagCache(forced=(0, 1))
    with pytest.raises(PolicyError, match="ratios is empty"):
        nearest_ratios([], 5)
    with pytest.raises(PolicyError, match="A run of 0 steps is too short"):
        nearest_ratios([1.0], 0)
