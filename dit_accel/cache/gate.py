"""Gate: turns the indicator of a step into compute or skip, and carries what it needs over the steps of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.signal import rescaled


@dataclass(frozen=True)
class GateState:
    """What the gate remembers between steps of one branch.

    accumulated, skips: since the last computed step; computed: steps computed behind the warm-up; all_skips,
    all_change: of the whole run; first_skip: where the first skip of the run was; left: steps of the present run still
    to be skipped; gap, next_step: the codebook's answer.
    """

    accumulated: float = 0.0
    skips: int = 0
    computed: int = 0
    all_skips: int = 0
    all_change: float = 0.0
    first_skip: int | None = None
    left: int = 0
    gap: int = 1
    next_step: int | None = None


@dataclass(frozen=True)
class Verdict:
    """compute: run the units; reason: why, in the words of the report; value: the number held against the threshold."""

    compute: bool
    reason: str
    value: float | None = None


def decide(
    cache: BlockCache, state: GateState, indicator: float | None, step: int = 0, steps: int | None = None
) -> Verdict:
    """Judge one step that the schedule leaves open. `indicator` is `None` where there is none to judge by.

    step: from 0; steps: of the run, `None` if unknown.
    """
    rule = cache.schedule
    if cache.threshold is None and rule.codebook is None:
        return Verdict(False, "schedule")
    if state.left > 0:
        return Verdict(False, "run")
    if rule.codebook is not None and state.skips > 0:
        planned = state.next_step is not None and step >= state.next_step
        return Verdict(True, "codebook") if planned else Verdict(False, "codebook")
    if state.skips < rule.shortest and not (indicator is not None and not math.isfinite(indicator)):
        return Verdict(False, "shortest run")
    if indicator is None:
        return Verdict(True, "no indicator")
    if not math.isfinite(indicator):
        return Verdict(True, "non-finite indicator", indicator)
    if rule.codebook is not None:
        gap = gap_of(rule.codebook, indicator / state.gap)
        return Verdict(gap <= 1, "codebook", indicator / state.gap)
    value = rescaled(cache.signal, indicator)
    value = state.accumulated + value if cache.accumulate else value
    if cache.threshold and value < threshold_at(cache, step, steps):  # a fit below 0 would pass a threshold of 0
        return Verdict(False, "below threshold", value)
    return Verdict(True, "above threshold", value)


def threshold_at(cache: BlockCache, step: int, steps: int | None) -> float:
    """The threshold in force: SpeCa (2509.11628) lowers it over the run, threshold * decay^(step / steps)."""
    assert cache.threshold is not None
    if cache.decay == 1.0 or not steps:
        return cache.threshold
    return max(cache.threshold * cache.decay ** (step / steps), cache.floor)


def gap_of(codebook: tuple[tuple[float, int], ...], rate: float) -> int:
    """AdaCache (2411.02397): the gap of the first bound above the rate; the last one for anything larger."""
    return next((gap for bound, gap in codebook if rate < bound), codebook[-1][1])


def after_skip(
    state: GateState, verdict: Verdict, cache: BlockCache | None = None, step: int = 0, steps: int | None = None
) -> GateState:
    """State after a skipped step: one more skip, and the sum that the verdict was passed on."""
    rule = None if cache is None else cache.schedule
    left, gap, next_step = max(0, state.left - 1), state.gap, state.next_step
    if rule is not None and rule.run is not None and verdict.reason == "below threshold":
        left = run_length(rule.run, steps) - 1
    if rule is not None and rule.codebook is not None and verdict.value is not None:
        gap = gap_of(rule.codebook, verdict.value)
        next_step = step - 1 + gap
    return replace(
        state,
        accumulated=state.accumulated if verdict.value is None else verdict.value,
        skips=state.skips + 1,
        all_skips=state.all_skips + 1,
        all_change=state.all_change + _measured(verdict, state, cache),
        first_skip=step if state.first_skip is None and cache is not None else state.first_skip,
        left=left,
        gap=gap,
        next_step=next_step,
    )


def after_compute(state: GateState, verdict: Verdict, cache: BlockCache, seen: int) -> GateState:
    """State after a computed step: the sum and the run begin anew."""
    gap = state.gap
    if cache.schedule.codebook is not None and verdict.value is not None:  # it was judged by its own rate
        gap = 1
    return GateState(
        computed=state.computed + (seen >= cache.warmup),
        all_skips=state.all_skips,
        all_change=state.all_change + _measured(verdict, state, cache),
        first_skip=state.first_skip,
        gap=gap,
    )


def _measured(verdict: Verdict, state: GateState, cache: BlockCache | None) -> float:
    """The change that a verdict was passed on, without what it had been summed to."""
    value = verdict.value
    if cache is None or cache.schedule.most_change is None or value is None or math.isnan(value):
        return 0.0
    return value - (state.accumulated if cache.accumulate else 0.0)


def run_length(share: float, steps: int | None) -> int:
    """BWCache (2509.13789): steps skipped at once, 3 of 30 and 5 of 50; rounded between, at least 1."""
    return max(1, round(share * (steps or 0)))
