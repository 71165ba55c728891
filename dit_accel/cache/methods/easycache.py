"""EasyCache (2507.02860): the change of the latent, times a rate measured when computing, foretells that of the output.

The model is seen from outside: input x and output y alone. Reused on skipped steps: y - x of the last computed one.
Guidance: the conditional branch decides, and the other follows with a residual of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dit_accel.cache.indicator import mean_absolute


@dataclass(frozen=True)
class EasyCacheSettings:
    """threshold: tau, the sum of estimated errors at which a step is computed; first, last: always computed."""

    threshold: float
    first: int
    last: int = 1


@dataclass(frozen=True)
class EasyCacheState:
    """accumulated: sum of the estimated errors since the last computed step."""

    accumulated: float = 0.0


PUBLISHED: dict[str, EasyCacheSettings] = {
    "wan2.1": EasyCacheSettings(0.05, first=10),  # the authors give 0.1 for about 2 times as fast and 0.2 for 3 times
    "hunyuan-video": EasyCacheSettings(0.025, first=5),
}
# NVIDIA Sol-Engine's choices; how many first steps it computes is not known here.
SOL_ENGINE_THRESHOLDS = {"sana-video": 0.1, "wan-5b": 0.036, "wan-14b": 0.30}


def transformation_rate(output: Tensor, output_before: Tensor, latent: Tensor, latent_before: Tensor) -> Tensor:
    """k = mean |y_a - y_b| / mean |x_a - x_b| -> []; all four of the latent's shape [B, C, (T,) H, W].

    a is the step just computed and b the one computed before it; steps skipped in between take no part.
    """
    return mean_absolute(output - output_before) / mean_absolute(latent - latent_before)


def error_estimate(rate: Tensor, latent: Tensor, latent_before: Tensor, output_computed: Tensor) -> Tensor:
    """k mean |x_i - x_{i-1}| / mean |y| -> []; x_{i-1}: the step before, skipped or not; y: last computed output."""
    return rate * mean_absolute(latent - latent_before) / mean_absolute(output_computed)


def decide(
    settings: EasyCacheSettings, state: EasyCacheState, error: float | None, step: int, steps: int | None
) -> tuple[bool, EasyCacheState]:
    """Compute this step? error: `error_estimate` of the step, `None` while no rate is known.

    step counts the steps of one branch from 0; steps: all of them, `None` if unknown, and then no last one is guarded.
    """
    forced = step < settings.first or (steps is not None and step >= steps - settings.last)
    if forced or error is None or not math.isfinite(error):
        return True, EasyCacheState()
    accumulated = state.accumulated + error
    if accumulated < settings.threshold:
        return False, EasyCacheState(accumulated)
    return True, EasyCacheState()
