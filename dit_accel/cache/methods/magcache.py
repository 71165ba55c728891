"""MagCache (arXiv 2506.09045): skip while the magnitude ratios of the residual, multiplied up, stay close to 1.

gamma_i = mean over tokens of ||r_i||_2 / ||r_{i-1}||_2 comes from one calibration run. Since the last computed step
R = prod gamma and E = sum |1 - R|; a step is skipped while E <= threshold and at most `max_skips` are in a row.
Reused is the residual of the whole stack, as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.cache.methods.mask import Mask, check_budget
from dit_accel.errors import PolicyError


@dataclass(frozen=True)
class MagCache:
    """When does the residual of the last computed step still do? The defaults are those of diffusers.

    threshold: largest accumulated error E (useful: 0.06 to 0.24; 0 never skips). max_skips: K, the longest run of
    skipped steps. retention: share of the run that is computed at its start. forced: (step, steps), a step that is
    always computed, as counted in a run of `steps` steps.
    """

    threshold: float = 0.06
    max_skips: int = 3
    retention: float = 0.2
    forced: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < math.inf:
            raise PolicyError(f"MagCache.threshold is {self.threshold}; give a finite number of at least 0.")
        if self.max_skips < 0:
            raise PolicyError(f"MagCache.max_skips is {self.max_skips}; give 0 or more.")
        if not 0.0 <= self.retention <= 1.0:
            raise PolicyError(f"MagCache.retention is {self.retention}; give a share from 0 to 1.")
        if self.forced is not None and self.forced[1] < 2:
            raise PolicyError(f"MagCache.forced is {self.forced}; give (step, steps) with at least 2 steps.")


@dataclass(frozen=True)
class MagState:
    """Since the last computed step: ratio, the product R; skips, the count n; error, the sum E."""

    ratio: float = 1.0
    skips: int = 0
    error: float = 0.0


# FLUX.1-dev, 28 steps, from the authors.
FLUX_RATIOS = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359),
    0.89062,
)

# The retention of HunyuanVideo, Wan2.2 and Qwen-Image was not found; theirs is the default of diffusers here.
PUBLISHED = {
    "diffusers": MagCache(),
    "flux": MagCache(0.24, 5, 0.1, forced=(11, 28)),
    "wan2.1-14b": MagCache(0.24, 6, 0.2),
    "wan2.1-1.3b": MagCache(0.12, 2, 0.2),
    "wan2.1-1.3b-fast": MagCache(0.12, 4, 0.2),
    "hunyuan-video": MagCache(0.12, 4),
    "hunyuan-video-fast": MagCache(0.24, 6),
    "wan2.2": MagCache(0.06, 2),
    "qwen-image": MagCache(0.06, 2),
}


def magnitude_ratios(residuals: Tensor) -> list[float]:
    """gamma [T] from the residuals of a full run [T, ..., channels]; the first is 1, it has nothing before it."""
    norms = torch.linalg.vector_norm(residuals.double(), dim=-1).flatten(start_dim=1)  # [T, tokens]
    return [1.0, *(norms[1:] / norms[:-1]).mean(dim=1).tolist()]


def nearest_ratios(ratios: Sequence[float], steps: int) -> list[float]:
    """A table of ratios stretched or shrunk to another number of steps [steps], each from the nearest place in the run.

    As published: the ratios are not adapted to the new distance between steps.
    """
    check_budget(1, steps)
    if not ratios:
        raise PolicyError("The table of MagCache ratios is empty; calibrate, or give a published one.")
    if steps == 1:
        return [ratios[-1]]
    scale = (len(ratios) - 1) / (steps - 1)
    return [ratios[round(step * scale)] for step in range(steps)]


def retained_steps(settings: MagCache, steps: int) -> int:
    """Steps at the start of a run that are always computed: at least one, because nothing is there to reuse before."""
    # Rounded to the nearest as in the authors' code for FLUX; code for HunyuanVideo of unclear origin rounds down.
    return max(1, int(settings.retention * steps + 0.5))


def decide(settings: MagCache, state: MagState, gamma: float, step: int, steps: int) -> tuple[bool, MagState]:
    """(compute?, state after step `step` of a run of `steps`); gamma: the ratio of this step."""
    if step < retained_steps(settings, steps) or _is_forced(settings, step, steps):
        return True, MagState()
    ratio = state.ratio * gamma
    after = MagState(ratio, state.skips + 1, state.error + abs(1.0 - ratio))
    # A ratio may be exactly 1; the published rule skips then even at threshold 0, here 0 never skips. A nan computes.
    if settings.threshold > 0 and after.error <= settings.threshold and after.skips <= settings.max_skips:
        return False, after
    return True, MagState()


def schedule(settings: MagCache, ratios: Sequence[float]) -> Mask:
    """Mask [T] that the rule gives over a whole run; it knows nothing of the content, so it can be made beforehand."""
    state = MagState()
    mask: list[bool] = []
    for step, gamma in enumerate(ratios):
        compute, state = decide(settings, state, gamma, step, len(ratios))
        mask.append(compute)
    return tuple(mask)


def _is_forced(settings: MagCache, step: int, steps: int) -> bool:
    if settings.forced is None or steps < 2:
        return False
    forced_step, of = settings.forced
    return round(step * (of - 1) / (steps - 1)) == forced_step
