"""TaylorSeer (2503.06923): compute every N-th step after a few at the start, forecast the outputs in between (eq. 8).

The forecast is that of `dit_accel.forecast.weights.taylor_weights`; here are the rules that say which steps are full.
The published code forecasts the attention and MLP output of every block, its "Lite" form the last block alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit_accel.forecast.weights import taylor_weights


@dataclass(frozen=True)
class TaylorSeerSettings:
    """interval: N, from one full step to the next; order: of the expansion; first: full steps at the start."""

    interval: int
    order: int = 1
    first: int = 1


@dataclass(frozen=True)
class TaylorSeerState:
    """anchors: numbers of the latest full steps, oldest first, as many as the order can use."""

    anchors: tuple[int, ...] = ()
    forecasts: int = 0


@dataclass(frozen=True)
class DiffusersSettings:
    """The hook of diffusers 0.42: full before step `before`, from step `after` on, and every `interval` in between."""

    interval: int = 5
    before: int = 3
    after: int | None = None
    order: int = 1


PUBLISHED: dict[str, TaylorSeerSettings] = {
    "flux": TaylorSeerSettings(6, first=3),
    "flux-kontext": TaylorSeerSettings(6, first=3),
    "hunyuan-video": TaylorSeerSettings(5),
    "wan2.1": TaylorSeerSettings(5),
    # DiT takes interval and order from the command line; these are rows of the paper's table, at 50 DDIM steps.
    "dit-xl": TaylorSeerSettings(3, order=3, first=2),
    "dit-xl-fast": TaylorSeerSettings(5, order=3, first=2),
}


def decide(settings: TaylorSeerSettings, state: TaylorSeerState, step: int) -> tuple[bool, TaylorSeerState]:
    """Compute this step, as in the published code? Full steps restart the count; no last step is guarded."""
    if step < settings.first or not state.anchors or state.forecasts >= settings.interval - 1:
        anchors = (*state.anchors, step)[-settings.order - 1 :]
        return True, TaylorSeerState(anchors)
    return False, TaylorSeerState(state.anchors, state.forecasts + 1)


def decide_diffusers(settings: DiffusersSettings, state: TaylorSeerState, step: int) -> tuple[bool, TaylorSeerState]:
    """Compute this step, as in diffusers? Its count is one off: step `before` itself is forecast, the next is full."""
    late = settings.after is not None and step >= settings.after
    if step < settings.before or (step - settings.before - 1) % settings.interval == 0 or late or not state.anchors:
        anchors = (*state.anchors, step)[-settings.order - 1 :]
        return True, TaylorSeerState(anchors)
    return False, TaylorSeerState(state.anchors, state.forecasts + 1)


def forecast_weights(anchors: Sequence[int], step: int, order: int) -> list[float]:
    """Weights over the outputs at the anchors, for a skipped step. Exact to degree 1 only, as published."""
    return taylor_weights([float(anchor) for anchor in anchors], float(step), order)
