"""DiCache (2508.17356): a probe of the first blocks says when to compute, and where between two anchors to forecast.

The probe runs every step and is resumed where the step is computed. Its change from step to step is summed against a
threshold; on skipped steps its residual places the stack's residual on the line through the two newest anchors (DCTA).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dit_accel.cache.indicator import mean_absolute, relative_l1


@dataclass(frozen=True)
class DiCacheSettings:
    """error: "delta" takes the probe's change, "delta_minus" its distance to the change of the input.

    retention: the share of the steps that are computed first; probe_blocks: 1 to 5.
    """

    threshold: float
    retention: float = 0.2
    error: Literal["delta", "delta_minus"] = "delta"
    probe_blocks: int = 1


@dataclass(frozen=True)
class DiCacheState:
    """accumulated: sum of the errors since the last computed step."""

    accumulated: float = 0.0


# The retention of 0.2 was read for FLUX; for the two others it is taken over from there.
PUBLISHED: dict[str, DiCacheSettings] = {
    "flux": DiCacheSettings(0.4),
    "flux-delta-minus": DiCacheSettings(0.08, retention=0.0, error="delta_minus"),
    "wan2.1": DiCacheSettings(0.2),
    "hunyuan-video": DiCacheSettings(0.1),
}
SMALLEST_GAMMA, LARGEST_GAMMA = 1.0, 1.5


def change(now: Tensor, before: Tensor) -> Tensor:
    """Relative L1 of the probe's output, or of its input, to the step before, both [B, N, C] -> []."""
    return relative_l1(now, before)


def error_of(settings: DiCacheSettings, probe_change: float, input_change: float) -> float:
    """delta_y, or |delta_y - delta_x|: what the probe does beyond passing on the change of its input."""
    return abs(probe_change - input_change) if settings.error == "delta_minus" else probe_change


def decide(
    settings: DiCacheSettings, state: DiCacheState, error: float | None, step: int, steps: int
) -> tuple[bool, DiCacheState]:
    """Compute this step? error: `error_of` the step, `None` without a step before it.

    Computed whatever the error: steps up to and with the retention's share of all steps, and the last one.
    """
    forced = step <= int(settings.retention * steps) or step >= steps - 1
    if forced or error is None or not math.isfinite(error):
        return True, DiCacheState()
    accumulated = state.accumulated + error
    if accumulated < settings.threshold:
        return False, DiCacheState(accumulated)
    return True, DiCacheState()


def alignment(probe: Tensor, probe_newest: Tensor, probe_older: Tensor) -> Tensor:
    """mean |p - p_older| / mean |p_newest - p_older| -> []: unclipped gamma, from probe residuals [B, N, C]."""
    return mean_absolute(probe - probe_older) / mean_absolute(probe_newest - probe_older)


def anchor_weights(gamma: float | None) -> list[float]:
    """Weights over the anchors, older first: r_older + gamma (r_newest - r_older), gamma clipped to 1 ... 1.5.

    `None` stands for a single anchor, reused as it is; equal probes (0/0) reuse the newest anchor too.
    """
    if gamma is None:
        return [1.0]
    clipped = LARGEST_GAMMA if gamma > LARGEST_GAMMA else max(SMALLEST_GAMMA, gamma)
    return [0.0, 1.0] if math.isnan(gamma) else [1.0 - clipped, clipped]
