"""AdaCache (2411.02397): at a computed step, how fast a residual changes says after how many steps to compute again.

The rate of change of the attention residual of chosen layers is looked up in a codebook, one answer for all blocks.
MoReg scales it by the motion that the residual itself shows. Reused: the attention (and MLP) residual of every block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dit_accel.cache.indicator import mean_absolute, relative_l1

Codebook = tuple[tuple[float, int], ...]
"""Pairs (bound, gap), bounds rising: a rate below the bound puts the next computed step `gap` steps ahead."""

CODEBOOK_100_STEPS: Codebook = ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3))
CODEBOOK_30_STEPS_FAST: Codebook = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1))
CODEBOOK_30_STEPS_SLOW: Codebook = ((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.40, 1), (1.0, 1))


@dataclass(frozen=True)
class AdaCacheSettings:
    """Open-Sora's defaults. layers: whose residual is measured (block 13); the choice for other models is not known.

    motion_window: steps, counted from 1, in which MoReg looks for motion, of 100; one for other numbers is not given.
    """

    codebook: Codebook = CODEBOOK_100_STEPS
    layers: tuple[int, ...] = (13,)
    motion: bool = False
    motion_scale: float = 0.385
    motion_power: float = 8.0
    motion_gradient: float = 10.0
    motion_window: tuple[int, int] = (10, 90)


@dataclass(frozen=True)
class AdaCacheState:
    """next_step: the step to compute next; gap: what the codebook last said; motion: MoReg's last factor."""

    next_step: int = 0
    gap: int = 1
    motion: float = 1.0


def residual_change(now: Tensor, cached: Tensor) -> Tensor:
    """Relative L1 of an attention residual to the one before, both [B, N, C] -> []; over the gap it is the rate."""
    return relative_l1(now, cached)


def motion_score(residual: Tensor, frame_tokens: int, stride: int = 1) -> Tensor:
    """How much the residual [B, T * S, C] differs between frames `stride` apart, 0 ... 1 -> []; frame_tokens: S.

    The reference averages this over strides, of which it uses only 1.
    """
    offset = stride * frame_tokens
    later, earlier = residual[:, offset:], residual[:, :-offset]
    return mean_absolute(later - earlier) / (mean_absolute(later) + mean_absolute(earlier))


def motion_factor(settings: AdaCacheSettings, state: AdaCacheState, step: int, score: float) -> tuple[float, float]:
    """MoReg: (the factor on the rate, what to remember as `motion`); above 1 it shortens the gap.

    (score / 0.385)^8 inside the window and 1 outside, plus 10 times its change per step.
    """
    start, end = settings.motion_window
    motion = (score / settings.motion_scale) ** settings.motion_power if start <= step + 1 <= end else 1.0
    gradient = settings.motion_gradient * (motion - state.motion) / state.gap
    return motion + abs(gradient), motion


def gap_of(codebook: Codebook, rate: float) -> int:
    """The gap of the first bound above the rate; the last one for anything larger. A rate that is no number gives 1."""
    if not math.isfinite(rate):
        return 1
    return next((gap for bound, gap in codebook if rate < bound), codebook[-1][1])


def decide(settings: AdaCacheSettings, state: AdaCacheState, step: int, steps: int) -> tuple[bool, AdaCacheState]:
    """Compute this step? The first one and the last two are, and the one that `observe` foresaw."""
    del settings
    return step == 0 or step >= steps - 2 or step >= state.next_step, state


def observe(
    settings: AdaCacheSettings, state: AdaCacheState, step: int, changes: Sequence[float], score: float | None = None
) -> AdaCacheState:
    """State after a computed step. changes: `residual_change` of each of `layers`, empty at the first step.

    score: `motion_score`, looked at only with `motion`. The reference divides by the gap it had planned, also where a
    forced step came sooner.
    """
    if not changes:
        return AdaCacheState(step + state.gap, state.gap, state.motion)
    rate = sum(changes) / len(changes) / state.gap
    factor, motion = 1.0, state.motion
    if settings.motion and score is not None:
        factor, motion = motion_factor(settings, state, step, score)
    gap = gap_of(settings.codebook, rate * factor)
    return AdaCacheState(step + gap, gap, motion)
