"""DPCache (arXiv 2602.22654): the computed steps with the smallest path-aware cost, found by dynamic programming.

C[i][j][k] = sum over t = j + 1 .. k - 1 of ||h_t - forecast of h_t from the anchors i and j||: what it costs to skip
from j to k when i was computed before j. h is the last block's output in one or a few calibration runs; k = T is the
end of the run. The paper forecasts with a second-order Taylor sum; how that goes with the two anchors of its cost is
unknown, so two anchors give at most a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.methods.mask import Mask, check_budget, mask_of
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope
from dit_accel.errors import PolicyError
from dit_accel.forecast.settings import Forecast
from dit_accel.forecast.weights import newton_weights

Weights = Callable[
    [Sequence[float], float], list[float]
]  # (places of the two anchors, place asked for) -> their weights
Path = tuple[int, ...]
INFINITY = float("inf")


@dataclass(frozen=True)
class DPCache:
    """computed: steps to compute, the budget. forced_first: steps that are always computed at the start."""

    computed: int
    forced_first: int = 3

    def __post_init__(self) -> None:
        if self.forced_first < 2:
            raise PolicyError(
                f"DPCache.forced_first is {self.forced_first}; give at least 2, because the cost needs two anchors."
            )


def linear_weights(anchors: Sequence[float], asked: float) -> list[float]:
    """First order through both anchors; the predictor of `cost_tensor` unless another is given."""
    return newton_weights(anchors, asked, 1)


def cost_tensor(features: Tensor, weights: Weights = linear_weights, places: Sequence[float] | None = None) -> Tensor:
    """C [T, T, T + 1] from the features of a full run [T, ...]; `inf` where i < j < k does not hold.

    places: coordinate of each step, its number if None. Average the tensors of several runs. ||.|| is the mean of |.|
    here, the paper's L1 norm up to a factor. Takes T^3 / 6 differences, so give a sample of the features.
    """
    flat = features.flatten(start_dim=1).double()
    steps = len(flat)
    u = [float(step) for step in range(steps)] if places is None else [float(place) for place in places]
    if len(u) != steps:
        raise PolicyError(f"DPCache got {len(u)} places for {steps} steps; give one for each.")
    cost = torch.full((steps, steps, steps + 1), INFINITY, dtype=torch.float64)
    for j in range(1, steps):
        later = flat[j + 1 :]
        for i in range(j):
            table = flat.new_tensor([weights([u[i], u[j]], u[t]) for t in range(j + 1, steps)]).reshape(-1, 2)
            errors = (later - table @ flat[[i, j]]).abs().mean(dim=1)
            cost[i, j, j + 1 :] = torch.cat([errors.new_zeros(1), errors.cumsum(dim=0)])
    return cost.nan_to_num(nan=INFINITY, posinf=INFINITY)


def best_schedule(settings: DPCache, cost: Tensor) -> Mask:
    """Mask [T] of the cheapest path with `settings.computed` steps; cost: [T, T, T + 1].

    Exact: it keeps the best path to each *pair* of last computed steps, on which the next cost depends.
    """
    table, steps = _checked(settings, cost)
    first = tuple(range(settings.forced_first))
    best: dict[tuple[int, int], tuple[float, Path]] = {(first[-2], first[-1]): (0.0, first)}
    for _ in range(settings.computed - len(first)):
        longer: dict[tuple[int, int], tuple[float, Path]] = {}
        for (i, j), (value, path) in best.items():
            for k in range(j + 1, steps):
                reached = (value + table[i][j][k], (*path, k))
                longer[j, k] = min(reached, longer.get((j, k), reached))
        best = longer
    return _cheapest(table, best.values(), steps)


def published_schedule(settings: DPCache, cost: Tensor) -> Mask:
    """The paper's recursion D[m][k] = min_j D[m-1][j] + C[P[m-1][j]][j][k]: one path to each *step*, hence not exact.

    It forgets the paths to j that are dearer so far, but whose anchor before j would make the next edge cheaper.
    """
    table, steps = _checked(settings, cost)
    first = tuple(range(settings.forced_first))
    best: dict[int, tuple[float, Path]] = {first[-1]: (0.0, first)}
    for _ in range(settings.computed - len(first)):
        longer: dict[int, tuple[float, Path]] = {}
        for j, (value, path) in best.items():
            for k in range(j + 1, steps):
                reached = (value + table[path[-2]][j][k], (*path, k))
                longer[k] = min(reached, longer.get(k, reached))
        best = longer
    return _cheapest(table, best.values(), steps)


def _checked(settings: DPCache, cost: Tensor) -> tuple[list[list[list[float]]], int]:
    steps = len(cost)
    if tuple(cost.shape) != (steps, steps, steps + 1):
        raise PolicyError(
            f"The DPCache cost has the shape {list(cost.shape)}; give [T, T, T + 1], as cost_tensor does."
        )
    check_budget(settings.computed, steps, fewest=settings.forced_first)
    return cost.tolist(), steps


def _cheapest(table: list[list[list[float]]], paths: Iterable[tuple[float, Path]], steps: int) -> Mask:
    """Mask [T] of the path that is cheapest once the steps behind its last computed one are paid for."""
    value, path = min((value + table[path[-2]][path[-1]][steps], path) for value, path in paths)
    if value == INFINITY:
        raise PolicyError("Every DPCache schedule of this length costs infinity; calibrate on finite features.")
    return mask_of(path, steps)


def cache(share: float = 0.28) -> BlockCache:
    """share: of the steps that are computed. The first run computes everything and measures; later ones go by its
    mask."""
    return BlockCache(
        None,
        warmup=3,
        tail=0,
        max_skips=None,
        scope=Scope("model", "output"),
        schedule=Schedule(calibrate="dpcache", budget=share),
    )


def forecast() -> Forecast:
    """The predictor of the cost: a line through both anchors."""
    return Forecast("newton", 1)
