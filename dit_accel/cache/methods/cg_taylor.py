"""CG-Taylor (2508.02240): trust the forecast of the last block where the forecast of the first block came true.

Block 1 always runs; its output is compared with a Taylor forecast from the last computed steps. Both histories grow at
computed steps only, so the error is that of the whole span since then, not of one step, and is not summed.
Guidance: the conditional branch decides and the other does the same (`CgTaylorState.compute`), from its own history.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dit_accel.cache.indicator import relative_l1
from dit_accel.forecast.weights import taylor_weights


@dataclass(frozen=True)
class CgTaylorSettings:
    """threshold: tau; first: steps computed at the start, one more than the published bound (cnt > 4 makes 5)."""

    threshold: float
    first: int
    first_block_order: int = 1
    last_block_order: int = 1


@dataclass(frozen=True)
class CgTaylorState:
    """anchors: numbers of the latest computed steps, oldest first; compute: the last verdict, for the other branch."""

    anchors: tuple[int, ...] = ()
    compute: bool = True


# HunyuanVideo computes the first 6 steps (cnt > 5), but no threshold for it was found. The FLUX code also leaves the
# first-block history empty while it warms up, which looks accidental and is not repeated here.
PUBLISHED: dict[str, CgTaylorSettings] = {
    "flux-fast": CgTaylorSettings(0.13, first=5),
    "flux": CgTaylorSettings(0.03, first=5),
    "wan2.1": CgTaylorSettings(0.36, first=6, first_block_order=3),
    "dit-xl": CgTaylorSettings(0.008, first=3, first_block_order=3),
}


def forecast_error(forecast: Tensor, actual: Tensor) -> Tensor:
    """mean |forecast - actual| / mean |actual| of the first block's output [B, N, C] -> []."""
    return relative_l1(forecast, actual)


def first_block_weights(settings: CgTaylorSettings, state: CgTaylorState, step: int) -> list[float]:
    """Weights over the first block's outputs at the anchors, oldest first."""
    return _weights(state, step, settings.first_block_order)


def last_block_weights(settings: CgTaylorSettings, state: CgTaylorState, step: int) -> list[float]:
    """Weights over the last block's outputs at the anchors, oldest first."""
    return _weights(state, step, settings.last_block_order)


def decide(
    settings: CgTaylorSettings, state: CgTaylorState, error: float | None, step: int, steps: int | None
) -> tuple[bool, CgTaylorState]:
    """Compute this step? error: `forecast_error` of the step, `None` while there is nothing to forecast from.

    step counts from 0; steps: all of them, `None` if unknown, and then the last one is not guarded.
    """
    forced = step < settings.first or not state.anchors or (steps is not None and step >= steps - 1)
    if not forced and error is not None and math.isfinite(error) and error < settings.threshold:
        return False, CgTaylorState(state.anchors, compute=False)
    kept = max(settings.first_block_order, settings.last_block_order) + 1
    return True, CgTaylorState((*state.anchors, step)[-kept:])


def _weights(state: CgTaylorState, step: int, order: int) -> list[float]:
    return taylor_weights([float(anchor) for anchor in state.anchors], float(step), order)
