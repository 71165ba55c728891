"""TeaCache: the polynomial and the sum, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from dit_accel.cache import BlockCache, Signal
from dit_accel.cache.gate import GateState, Verdict, decide
from dit_accel.cache.methods.teacache import PUBLISHED, cache
from dit_accel.cache.schedule import must_compute
from dit_accel.cache.signal import rescaled
from dit_accel.errors import PolicyError

Replay = Callable[..., str]

LINE = (2.0, 0.0)  # the polynomial 2 x


def simple(threshold: float, coefficients: tuple[float, ...] = LINE, model: str = "flux") -> BlockCache:
    """The rule of a model with a polynomial for mental arithmetic."""
    rule = cache(model, threshold)
    return replace(rule, signal=replace(rule.signal, rescale=coefficients))


def test_the_published_polynomial_at_a_tenth() -> None:
    # FLUX: 498.651651 e-4 - 283.781631 e-3 + 55.8554382 e-2 - 0.382021401 + 0.264230861
    #     = 0.0498651651 - 0.283781631 + 0.558554382 - 0.382021401 + 0.264230861
    assert rescaled(cache("flux").signal, 0.1) == pytest.approx(0.2068473761, abs=1e-9)
    assert rescaled(cache("lumina2").signal, 0.0) == 0.86377344
    assert rescaled(Signal("modulated", rescale=()), 0.3) == 0.0
    assert rescaled(Signal("modulated"), 0.3) == 0.3


def test_the_sum_falls_to_zero_at_a_computed_step(replay: Replay) -> None:
    # doubled: - .04 .04 .04 .10 .02 -; sums: - .04 .08 .12 -> computed, .10 -> computed, .02, last
    changes = [None, 0.02, 0.02, 0.02, 0.05, 0.01, 0.01]
    assert replay(simple(0.1), changes) == "C..CC.C"


def test_retained_steps_of_wan_have_no_last_one(replay: Replay) -> None:
    assert replay(simple(1.0, model="wan2.1-t2v-14b-ret"), [None] + [0.01] * 7) == "CCCCC..."
    assert replay(simple(1.0, model="wan2.1-t2v-14b"), [None] + [0.01] * 7) == "C......C"


def test_an_unknown_number_of_steps_guards_no_last_one() -> None:
    assert must_compute(simple(1.0), 9, None, 0) is None
    assert decide(simple(1.0), GateState(), 0.01, 9, None) == Verdict(False, "below threshold", 0.02)


@pytest.mark.parametrize("change", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(change: float | None) -> None:
    assert decide(simple(1.0), GateState(accumulated=0.5, skips=1), change, 3, 9).compute


def test_a_threshold_of_zero_never_skips_even_below_zero(replay: Replay) -> None:
    below = (1.0, -0.5)  # x - 0.5
    assert replay(simple(0.0, below), [None] + [0.01] * 5) == "CCCCCC"
    assert replay(simple(0.1, below), [None] + [0.01] * 5) == "C....C"


def test_published_settings() -> None:
    assert cache("flux").threshold == 0.25
    assert cache("flux", 0.6).threshold == 0.6
    assert all(len(found.coefficients) == 5 for found in PUBLISHED.values())
    assert all(tuple(sorted(found.thresholds)) == found.thresholds for found in PUBLISHED.values())
    with pytest.raises(PolicyError, match="did you mean 'flux'"):
        cache("fluxx")
    with pytest.raises(PolicyError, match="give threshold="):
        cache("cosmos")
    assert cache("cosmos", 0.2).threshold == 0.2


def test_wan_is_judged_by_its_time_embedding() -> None:
    assert cache("wan2.1-t2v-1.3b").signal.of == "time"
    assert cache("hunyuan-video").signal.of == "modulated"
