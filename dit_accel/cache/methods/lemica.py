"""LeMiCa (arXiv 2511.00090) and CEM (2512.23258): the schedule with the best path over the costs of skipping.

An edge i -> j computes step i and skips the steps up to j. LeMiCa takes the path whose edge costs, sorted from the
largest, come first in the dictionary: the worst edge is as cheap as can be, then the second worst, and so on. CEM takes
the path with the smallest sum. Both are exact for a given number of computed steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.methods.mask import Mask, best_path, mask_of
from dit_accel.cache.schedule import Schedule

EdgeCosts = Sequence[Sequence[float]]


def minimax_schedule(cost: EdgeCosts, computed: int) -> Mask:
    """LeMiCa: mask [T] of the path with exactly `computed` edges that is lexicographically smallest, worst edge first.

    cost: [T, T + 1], read for i < j; `inf` forbids an edge. LeMiCa measures it by whole runs: the error of the final
    output when nothing but the steps between i and j is skipped. That a run may end in skipped steps is inferred; to
    force the last step, forbid every edge to T but that of step T - 1.
    """
    return mask_of(best_path(cost, computed, (), _with_edge), len(cost))


def cumulative_schedule(cost: EdgeCosts, computed: int) -> Mask:
    """CEM: mask [T] of the path with exactly `computed` edges whose costs have the smallest sum. cost: [T, T + 1]."""
    return mask_of(best_path(cost, computed, 0.0, float.__add__), len(cost))


def cosine_costs(features: Tensor) -> list[list[float]]:
    """Edge costs [T, T + 1] from the features of a full run [T, ...]: the reuse errors 1 - cos(h_i, h_k), summed.

    cost[i][j] adds the skipped steps k = i + 1 .. j - 1; `inf` where j <= i. CEM's E(t, n) = 1 - cos(D(t), D(t + n))
    and its running sum are published; that the sum runs over the steps that one computed step serves is inferred.
    """
    flat = torch.nn.functional.normalize(features.flatten(start_dim=1).double(), dim=1)
    errors: list[list[float]] = (1.0 - flat @ flat.T).clamp(min=0.0).tolist()
    steps = len(errors)
    costs = [[float("inf")] * (steps + 1) for _ in range(steps)]
    for i in range(steps):
        total = 0.0
        for j in range(i + 1, steps + 1):
            costs[i][j] = total
            if j < steps:
                total += errors[i][j]
    return costs


def limit_skips(cost: EdgeCosts, longest: int) -> list[list[float]]:
    """The same costs [T, T + 1] with every edge forbidden that skips more than `longest` steps."""
    return [
        [value if j - i - 1 <= longest else float("inf") for j, value in enumerate(row)] for i, row in enumerate(cost)
    ]


def _with_edge(edges: tuple[float, ...], edge: float) -> tuple[float, ...]:
    return tuple(sorted((*edges, edge), reverse=True))


def cache(share: float = 0.5, kind: str = "lemica") -> BlockCache:
    """share: of the steps that are computed; kind: "lemica" or "cem". The first run computes everything and measures
    the reuse errors of the stack's residual (LeMiCa itself measures whole runs); later ones go by its mask."""
    return BlockCache(
        None,
        warmup=1,
        tail=0,
        max_skips=None,
        probe_blocks=0,
        schedule=Schedule(calibrate=kind, budget=share),
    )
