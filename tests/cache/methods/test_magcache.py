"""MagCache replayed on short tables of ratios, with the sums in the comments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from dit_accel.cache import BlockCache
from dit_accel.cache.gate import GateState, after_skip, decide
from dit_accel.cache.methods.magcache import FLUX_RATIOS, PUBLISHED, cache, drift, magnitude_ratios, nearest_ratios
from dit_accel.errors import PolicyError

Replay = Callable[..., str]

EIGHT = [1.0, 1.5, 1.02, 1.02, 0.98, 0.95, 1.0, 0.99]


def computed_steps(replay: Replay, rule: BlockCache, ratios: Sequence[float]) -> list[int]:
    skips = 0

    def drifted(step: int, was_computed: bool) -> float | None:
        nonlocal skips
        skips = 0 if was_computed or not step else skips + 1
        return drift(ratios, step, skips)

    return [step for step, mark in enumerate(replay(rule, drifted, steps=len(ratios))) if mark == "C"]


def with_mask(rule: BlockCache, mask: str) -> BlockCache:
    """The steps that the authors force are a mask here."""
    return replace(rule, schedule=replace(rule.schedule, mask=mask))


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        # 1: |1 - 1.5| > .1 -> computed. 2: R 1.02, E .02; 3: R 1.0404, E .0604; 4: R 1.0196, E .08 -> three skips;
        # 5: n = 4 > 3 -> computed. 6: R 1, E 0; 7: R .99, E .01 -> skipped
        (cache(0.1, 3, 0.0), [0, 1, 5]),
        # 5, without a limit: R 1.01959 x .95 = .96861, E .07999 + .03139 = .1114 > .1 -> computed all the same
        (cache(0.1, 9, 0.0), [0, 1, 5]),
        # 5 fits now, E .1114; 6: R .96861, E .1428; 7: R .95893, E .1838
        (cache(0.19, 9, 0.0), [0, 1]),
        # 1 skipped at last: R 1.5, E .5; 2: R 1.53, E 1.03 > .6 -> computed; from there E stays below
        (cache(0.6, 9, 0.0), [0, 2]),
        # E .5 is not below .5 -> computed; as published a step is skipped up to and with the threshold, so that 1 were
        # skipped here too, and 2 computed
        (cache(0.5, 9, 0.0), [0, 1]),
        # 3 first: R 1.02, E .02; 4: R .9996, E .0204; 5: .94962, E .0708; 6: n = 4 -> computed; 7: E .01
        (cache(0.1, 3, 0.375), [0, 1, 2, 6]),
        # step 4 of 8 forced: 2, 3 skipped; 4; 5: R .95, E .05; 6: R .95, E .1 (just), 7: R .9405, E .1595 -> computed
        (with_mask(cache(0.1001, 3, 0.0), "10001000"), [0, 1, 4, 7]),
        (cache(0.1, 0, 0.0), list(range(8))),
        (cache(0.0, 3, 0.0), list(range(8))),
        (cache(0.1, 3, 1.0), list(range(8))),
    ],
)
def test_a_run_by_hand(replay: Replay, settings: BlockCache, computed: list[int]) -> None:
    assert computed_steps(replay, settings, EIGHT) == computed


def test_the_drift_is_that_of_the_product_since_the_last_computed_step() -> None:
    assert drift(EIGHT, 2, 0) == pytest.approx(0.02)
    assert drift(EIGHT, 3, 1) == pytest.approx(0.0404)  # 1.02^2
    assert drift(EIGHT, 4, 2) == pytest.approx(0.019592)  # x .98
    assert drift(EIGHT, 8, 0) is None and drift((), 0, 0) is None


def test_the_sum_is_handed_on() -> None:
    rule = cache(0.1, 2, 0.2)
    verdict = decide(rule, GateState(), 0.02, 5, 20)
    state = after_skip(GateState(), verdict, rule, 5, 20)
    assert (verdict.compute, state.skips, state.accumulated) == (False, 1, pytest.approx(0.02))
    state = after_skip(state, decide(rule, state, 0.0404, 6, 20), rule, 6, 20)
    assert (state.skips, state.accumulated) == (2, pytest.approx(0.0604))


def test_threshold_zero_never_skips_and_neither_does_a_ratio_that_is_no_number(replay: Replay) -> None:
    # a ratio may be exactly 1; the published rule skips then even at threshold 0
    assert computed_steps(replay, cache(0.0, 9, 0.0), [1.0] * 6) == list(range(6))
    assert computed_steps(replay, cache(9.0, 9, 0.0), [math.nan] * 6) == list(range(6))
    assert computed_steps(replay, cache(), [1.0]) == [0]


def test_no_table_never_skips(replay: Replay) -> None:
    assert replay(cache(9.0, 9, 0.0), [None] * 5) == "CCCCC"


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


def test_the_published_settings_for_flux(replay: Replay) -> None:
    assert len(FLUX_RATIOS) == 28
    flux = cache(*PUBLISHED["flux"])
    # .1 x 28 rounds to 3. 3: R 1.07812, E .078; 4: R 1.1455, E .2236; 5: 1.1902 -> computed. 6: E .03125;
    # 7: R 1.0715, E .1028; 8: R 1.0966, E .1994; 9: E .33 -> computed. 10: E .023; 11 is forced. 12: E .0156;
    # 13: R 1.0236, E .0392; 14: E .0627; 15: R 1.0315, E .0943; 16: E .1258; 17 is the sixth -> computed.
    # 18, 19: E 0; 20: .0039; 21: R .9922, E .0117; 22: R .9728, E .0389; 23 is the sixth -> computed.
    # 24: E .0352; 25: R .9234, E .1118; 26: R .8621, E .2497 -> computed. 27: E .1094
    forced = with_mask(flux, "1" + "0" * 10 + "1" + "0" * 16)
    assert computed_steps(replay, forced, FLUX_RATIOS) == [0, 1, 2, 5, 9, 11, 17, 23, 26]
    # Without the forced step: 11: R 1.0035, E .0269; 12: R 1.0191, E .046; 13: R 1.0271, E .0731; 14: E .1002; 15 is
    # the sixth -> computed. 16: E 0; 17: R 1.0078, E .0078; 18: E .0156; 19: .0234; 20: R 1.0039, E .0273; 21 is the
    # sixth -> computed. 22: E .0195; 23: R .969, E .0505; 24: R .9349, E .1156; 25: R .8947, E .2208; 26 -> computed
    assert computed_steps(replay, flux, FLUX_RATIOS) == [0, 1, 2, 5, 9, 15, 21, 26]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(PolicyError, match="threshold is nan"):
        cache(math.nan)
    with pytest.raises(PolicyError, match="max_skips is -1"):
        cache(max_skips=-1)
    with pytest.raises(PolicyError, match=r"retention is 1\.5"):
        cache(retention=1.5)
    with pytest.raises(PolicyError, match="ratios is empty"):
        nearest_ratios([], 5)
    with pytest.raises(PolicyError, match="A run of 0 steps is too short"):
        nearest_ratios([1.0], 0)
