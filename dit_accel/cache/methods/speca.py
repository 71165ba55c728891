"""SpeCa (2509.11628): forecast with TaylorSeer, verify at the last block, and compute the next step if it was far off.

At a forecast step the last block also runs truly, on the forecast input. Nothing is rolled back: the step stays, and
the error decides for the one after it, under a threshold that decays over the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SpecaSettings:
    """threshold * decay^(step / steps), at least `floor`; shortest, longest: forecasts in a row; order: of the draft.

    first: steps that are computed at the start, but for every one that follows a computed one.
    """

    threshold: float
    decay: float
    floor: float
    shortest: int
    longest: int
    order: int
    first: int = 3


@dataclass(frozen=True)
class SpecaState:
    """computed: the step before was; forecasts: how many were made since."""

    computed: bool = False
    forecasts: int = 0


PUBLISHED: dict[str, SpecaSettings] = {
    "flux": SpecaSettings(threshold=7.0, decay=0.3, floor=0.1, shortest=2, longest=8, order=2),
    "dit-xl": SpecaSettings(threshold=0.3, decay=0.05, floor=0.01, shortest=3, longest=8, order=4),
}


def verification_error(forecast: Tensor, true: Tensor) -> Tensor:
    """mean( |forecast - true| / (|true| + 1e-10) ), element by element, of the last block's outputs [B, N, C] -> [].

    Elements near 0 weigh heavily, unlike in a ratio of means: hence a threshold as high as 7.
    """
    forecast, true = forecast.float(), true.float()  # 1e-10 is 0 in fp16
    return ((forecast - true).abs() / (true.abs() + 1e-10)).mean()


def threshold_at(settings: SpecaSettings, step: int, steps: int) -> float:
    """The threshold in force at a step, counted from 0."""
    return max(settings.threshold * settings.decay ** (step / steps), settings.floor)


def decide(
    settings: SpecaSettings, state: SpecaState, error: float | None, step: int, steps: int
) -> tuple[bool, SpecaState]:
    """Compute this step? error: `verification_error` of the step before, `None` if that was computed.

    As published a step after a computed one is never computed, even among the first, and an error is heeded only
    after `shortest` forecasts. An error that is no number computes, which the reference does not.
    """
    if state.computed:
        return False, SpecaState(forecasts=1)
    too_large = error is not None and (not math.isfinite(error) or error > threshold_at(settings, step, steps))
    heeded = too_large and state.forecasts >= settings.shortest
    if step < settings.first or state.forecasts >= settings.longest or heeded:
        return True, SpecaState(computed=True)
    return False, SpecaState(forecasts=state.forecasts + 1)
