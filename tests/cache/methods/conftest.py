"""A run of the gate, step by step: what the rule of a method decides on a trace that was worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from dit_accel.cache import BlockCache
from dit_accel.cache.gate import GateState, Verdict, after_compute, after_skip, decide
from dit_accel.cache.schedule import must_compute

Indicators = Sequence[float | None] | Callable[[int, bool], float | None]


@pytest.fixture
def replay() -> Callable[..., str]:
    """`replay(cache, indicators, *, steps=None, times=None)`: one mark a step, C computed and . skipped."""
    return _replay


def _replay(
    cache: BlockCache, indicators: Indicators, *, steps: int | None = None, times: Sequence[float] | None = None
) -> str:
    """indicators: one a step, or a function of the step and of whether the one before was computed, for signals that
    are known only behind a step; then `steps` is the length of the run. times: time step of each step, 1000 to 0.

    As `dit_accel.denoiser.forward` does it, but for the first two steps, which a real forward always computes.
    """
    if steps is None:
        assert not callable(indicators), "give steps"
        steps = len(indicators)
    state, marks = GateState(), ""
    for step in range(steps):
        indicator = indicators(step, marks.endswith("C")) if callable(indicators) else indicators[step]
        time = None if times is None else times[step]
        forced = must_compute(cache, step, steps - step, state.skips, gate=state, time=time)
        verdict = Verdict(True, forced) if forced else decide(cache, state, indicator, step, steps)
        if verdict.compute:
            state = after_compute(state, verdict, cache, step)
        else:
            state = after_skip(state, verdict, cache, step, steps)
        marks += "C" if verdict.compute else "."
    return marks
