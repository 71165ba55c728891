"""Gate: turns the indicator of a step into compute or skip, and carries the sum over skipped steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dit_accel.cache.block_cache import BlockCache


@dataclass(frozen=True)
class GateState:
    """What the gate remembers between steps of one branch."""

    accumulated: float = 0.0
    skips: int = 0


@dataclass(frozen=True)
class Verdict:
    """compute: run the stack; reason: why, in the words of the report; value: the number held against the threshold."""

    compute: bool
    reason: str
    value: float | None = None


def decide(cache: BlockCache, state: GateState, indicator: float | None) -> Verdict:
    """Judge one step that the schedule leaves open. `indicator` is `None` for a schedule without a threshold."""
    if cache.threshold is None:
        return Verdict(False, "schedule")
    if indicator is None:
        return Verdict(True, "no indicator")
    if not math.isfinite(indicator):
        return Verdict(True, "non-finite indicator", indicator)
    value = state.accumulated + indicator if cache.accumulate else indicator
    if value < cache.threshold:
        return Verdict(False, "below threshold", value)
    return Verdict(True, "above threshold", value)


def after_skip(state: GateState, verdict: Verdict) -> GateState:
    """State after a skipped step: one more skip, and the sum that the verdict was passed on."""
    return GateState(state.accumulated if verdict.value is None else verdict.value, state.skips + 1)
