"""TeaCache: the polynomial and the sum, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from dit_accel.cache.methods.teacache import (
    PUBLISHED,
    TeaCacheSettings,
    TeaCacheState,
    decide,
    published_settings,
    rescale,
)
from dit_accel.errors import PolicyError

LINE = (2.0, 0.0)  # the polynomial 2 x


def replay(settings: TeaCacheSettings, changes: list[float | None]) -> str:
    state, marks = TeaCacheState(), ""
    for step, change in enumerate(changes):
        compute, state = decide(settings, state, change, step, len(changes))
        marks += "C" if compute else "."
    return marks


def test_the_published_polynomial_at_a_tenth() -> None:
    # FLUX: 498.651651 e-4 - 283.781631 e-3 + 55.8554382 e-2 - 0.382021401 + 0.264230861
    #     = 0.0498651651 - 0.283781631 + 0.558554382 - 0.382021401 + 0.264230861
    assert rescale(PUBLISHED["flux"].coefficients, 0.1) == pytest.approx(0.2068473761, abs=1e-9)
    assert rescale(PUBLISHED["lumina2"].coefficients, 0.0) == 0.86377344
    assert rescale((), 0.3) == 0.0


def test_the_sum_falls_to_zero_at_a_computed_step() -> None:
    # doubled: - .04 .04 .04 .10 .02 -; sums: - .04 .08 .12 -> computed, .10 -> computed, .02, last
    changes = [None, 0.02, 0.02, 0.02, 0.05, 0.01, 0.01]
    assert replay(TeaCacheSettings(LINE, 0.1), changes) == "C..CC.C"


def test_retained_steps_of_wan_have_no_last_one() -> None:
    assert replay(TeaCacheSettings(LINE, 1.0, first=5, last=0), [None] + [0.01] * 7) == "CCCCC..."
    assert replay(TeaCacheSettings(LINE, 1.0), [None] + [0.01] * 7) == "C......C"
    assert published_settings("wan2.1-t2v-14b-ret").first == 5
    assert published_settings("wan2.1-t2v-14b").first == published_settings("wan2.1-t2v-14b").last == 1


def test_an_unknown_number_of_steps_guards_no_last_one() -> None:
    assert decide(TeaCacheSettings(LINE, 1.0), TeaCacheState(), 0.01, 9, None) == (False, TeaCacheState(0.02))


@pytest.mark.parametrize("change", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(change: float | None) -> None:
    assert decide(TeaCacheSettings(LINE, 1.0), TeaCacheState(0.5), change, 3, 9) == (True, TeaCacheState())


def test_a_threshold_of_zero_never_skips_even_below_zero() -> None:
    below = (1.0, -0.5)  # x - 0.5
    assert replay(TeaCacheSettings(below, 0.0), [None] + [0.01] * 5) == "CCCCCC"
    assert replay(TeaCacheSettings(below, 0.1), [None] + [0.01] * 5) == "C....C"


def test_published_settings() -> None:
    assert published_settings("flux").threshold == 0.25
    assert published_settings("flux", 0.6).threshold == 0.6
    assert all(len(found.coefficients) == 5 for found in PUBLISHED.values())
    assert all(tuple(sorted(found.thresholds)) == found.thresholds for found in PUBLISHED.values())
    with pytest.raises(PolicyError, match="did you mean 'flux'"):
        published_settings("fluxx")
    with pytest.raises(PolicyError, match="give threshold="):
        published_settings("cosmos")
    assert published_settings("cosmos", 0.2).threshold == 0.2
