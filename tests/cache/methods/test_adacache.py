"""AdaCache: rate and codebook against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from dit_accel.cache.gate import GateState, Verdict, after_compute, after_skip, decide, gap_of
from dit_accel.cache.methods.adacache import (
    CODEBOOK_30_STEPS_FAST,
    CODEBOOK_30_STEPS_SLOW,
    CODEBOOK_100_STEPS,
    Codebook,
    cache,
)

Replay = Callable[..., str]


def computed_steps(replay: Replay, codebook: Codebook, changes: dict[int, float], steps: int) -> list[int]:
    """changes: measured at the computed steps but the first, which has none before it; known one step later."""

    def change(step: int, was_computed: bool) -> float | None:
        return changes.get(step - 1, 9.0) if was_computed and step > 1 else None

    marks = replay(cache(codebook), change, steps=steps)
    return [step for step, mark in enumerate(marks) if mark == "C"]


@pytest.mark.parametrize(("rate", "gap"), [(0.0, 12), (0.03, 10), (0.049, 10), (0.1, 4), (0.11, 3), (5.0, 3)])
def test_codebook_of_100_steps(rate: float, gap: int) -> None:
    assert gap_of(CODEBOOK_100_STEPS, rate) == gap


def test_codebooks_of_30_steps() -> None:
    assert [gap_of(CODEBOOK_30_STEPS_FAST, rate) for rate in (0.01, 0.1, 0.2, 0.3, 0.35, 0.5)] == [6, 5, 4, 3, 2, 1]
    assert [gap_of(CODEBOOK_30_STEPS_SLOW, rate) for rate in (0.01, 0.1, 0.2, 3.0)] == [3, 2, 1, 1]


def test_replay_by_hand(replay: Replay) -> None:
    # step 0, gap 1 -> step 1: change .2 / 1 -> gap 4 (below .24) -> step 5: .2 / 4 = .05 -> gap 6 -> step 11:
    # .6 / 6 = .1 -> gap 5 -> step 16; of 20 steps the last two, 18 and 19, are computed as well
    changes = {1: 0.2, 5: 0.2, 11: 0.6, 16: 0.01}
    assert computed_steps(replay, CODEBOOK_30_STEPS_FAST, changes, 20) == [0, 1, 5, 11, 16, 18, 19]


def test_a_gap_of_one_computes_the_next_step(replay: Replay) -> None:
    # 1: .5 / 1 -> gap 1 -> 2: .3 / 1 -> gap 3 (below .32) -> 5: 3 / 3 -> gap 1 -> 6: .35 / 1, and not / 3, -> gap 2 ->
    # 8
    changes = {1: 0.5, 2: 0.3, 5: 3.0, 6: 0.35, 8: 0.01}
    assert computed_steps(replay, CODEBOOK_30_STEPS_FAST, changes, 12) == [0, 1, 2, 5, 6, 8, 10, 11]


def test_a_codebook_of_ones_never_skips(replay: Replay) -> None:
    assert computed_steps(replay, ((1.0, 1),), dict.fromkeys(range(9), 0.0), 9) == list(range(9))


def test_the_rate_is_the_change_over_the_gap_that_was_planned() -> None:
    # computed at step 7, two steps behind the last: .4 / gap 2 = .2 -> below .24 -> 4 -> step 11
    rule = cache(CODEBOOK_30_STEPS_FAST)
    verdict = decide(rule, GateState(gap=2), 0.4, 8, 30)
    assert verdict == Verdict(False, "codebook", pytest.approx(0.2))
    state = after_skip(GateState(gap=2), verdict, rule, 8, 30)
    assert (state.gap, state.next_step) == (4, 11)
    assert decide(rule, state, None, 10, 30) == Verdict(False, "codebook")
    planned = decide(rule, state, None, 11, 30)
    assert planned == Verdict(True, "codebook")
    assert after_compute(state, planned, rule, 11).gap == 4


@pytest.mark.parametrize("change", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(change: float | None) -> None:
    assert decide(cache(), GateState(gap=4), change, 9, 100).compute


def test_the_attention_in_the_middle_is_measured_and_both_layers_are_reused() -> None:
    assert (cache().signal.of, cache().signal.units) == ("units", "middle")
    assert cache().scope.skips_layer("attention") and cache().scope.skips_layer("mlp")
