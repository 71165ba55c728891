"""Sortblock (2508.00412): of every K steps one is full, one is forecast, and in the rest the odd blocks are recomputed.

Block by block, the residual h^l - h^(l-1) is forecast linearly from its last two computed values. After the forecast
step the blocks are ranked by the cosine of forecast and last full residual; a share of them, given by a polynomial of
the timestep, is recomputed until the next full step. (The cosine so tells how far the forecast moved, not its error.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SortblockSettings:
    """interval: K, 4 to 9; share: beta, 0 to 1; start, end: timesteps, 0 ... 1000, outside which all is full.

    coefficients: of the share to recompute over the timestep, highest power first. The authors give ranges (start 900
    to 950, end 50 to 100); which value belongs to which model is not known here.
    """

    coefficients: tuple[float, ...]
    interval: int
    share: float
    start: float
    end: float


@dataclass(frozen=True)
class SortblockState:
    """count: steps met inside the window; chosen: blocks to recompute until the next full step."""

    count: int = 0
    chosen: frozenset[int] = frozenset()


FLUX_COEFFICIENTS = (5.67621e-14, -1.36659e-10, 1.16246e-7, -3.97725e-5, 0.00361, 0.56088)
WAN_COEFFICIENTS = (-1.74367e-15, 1.20871e-11, -2.11429e-8, 1.49777e-5, -0.00453, 0.4971)


def similarity(full: Tensor, forecast: Tensor) -> Tensor:
    """Mean over tokens of the cosine of two residuals [B, N, C], on the first eighth of their channels -> []."""
    channels = max(1, full.shape[-1] // 8)
    return torch.cosine_similarity(full[..., :channels].float(), forecast[..., :channels].float(), dim=-1).mean()


def recompute_share(settings: SortblockSettings, timestep: float) -> float:
    """pi = beta * polynomial(timestep), kept within 0 ... 1 because a quantile is asked for with it."""
    value = 0.0
    for coefficient in settings.coefficients:
        value = value * timestep + coefficient
    return min(max(settings.share * value, 0.0), 1.0)


def least_similar(similarities: Sequence[float], share: float) -> frozenset[int]:
    """Numbers of the blocks whose similarity is at or below the quantile `share`, so at least one of them.

    The quantile is interpolated between ranks (inferred). Double and single blocks are ranked apart: call this for
    each stream. A similarity that is no number means recompute, and takes no part in the ranking.
    """
    ranked = [value for value in similarities if math.isfinite(value)]
    bound = torch.tensor(ranked, dtype=torch.float64).quantile(share).item() if ranked else math.inf
    return frozenset(k for k, value in enumerate(similarities) if not math.isfinite(value) or value <= bound)


def decide(
    settings: SortblockSettings, state: SortblockState, timestep: float, blocks: int
) -> tuple[frozenset[int], SortblockState]:
    """The blocks to compute in this step, and the state; the others are forecast.

    Outside the window the count starts anew (inferred: the published code counts on, from where is not known).
    """
    everything = frozenset(range(blocks))
    if not settings.end <= timestep <= settings.start:
        return everything, SortblockState()
    place = state.count % settings.interval
    if place == 0:
        return everything, SortblockState(state.count + 1)
    chosen = frozenset[int]() if place == 1 else state.chosen
    return chosen, SortblockState(state.count + 1, chosen)


def observe(state: SortblockState, chosen: frozenset[int]) -> SortblockState:
    """State after the forecast step that follows a full one: `least_similar` has named the blocks to recompute."""
    return SortblockState(state.count, chosen)
