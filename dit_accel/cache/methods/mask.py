"""Masks of a run, and the best path through its steps: what the schedules that are made offline have in common.

A mask [T] is true where a step is computed. A path is the same schedule seen as edges: the edge i -> j computes step i
and skips the steps between, and the last edge ends at T, one behind the last step (so a path may end in skipped steps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from dit_accel.errors import PolicyError

Mask = tuple[bool, ...]
Value = TypeVar("Value", float, tuple[float, ...])


def mask_of(computed: Iterable[int], steps: int) -> Mask:
    """Mask [steps] from the numbers of the computed steps; step 0 is always one: nothing is there to be reused."""
    wanted = frozenset(computed)
    if 0 not in wanted or not all(0 <= step < steps for step in wanted):
        raise PolicyError(
            f"The computed steps are {sorted(wanted)} of {steps}; give numbers from 0 to {steps - 1}, 0 among them."
        )
    return tuple(step in wanted for step in range(steps))


def steps_of(mask: Sequence[bool]) -> list[int]:
    """Numbers of the computed steps of a mask [T], in order."""
    return [step for step, compute in enumerate(mask) if compute]


def check_budget(computed: int, steps: int, fewest: int = 1) -> None:
    """Refuse a number of computed steps that a run of `steps` steps cannot have."""
    if not fewest <= computed <= steps:
        raise PolicyError(
            f"The number of computed steps is {computed} in a run of {steps}; give {fewest} to {steps}."
            if fewest <= steps
            else f"A run of {steps} steps is too short to compute the {fewest} that always are; give more steps."
        )


def best_path(
    cost: Sequence[Sequence[float]], computed: int, start: Value, extend: Callable[[Value, float], Value]
) -> list[int]:
    """Steps of the cheapest path from step 0 to the end that computes exactly `computed` steps.

    cost: [T, T + 1], cost[i][j] of the edge i -> j for i < j, `inf` forbids it; extend: (value of a path, cost of
    one more edge) -> value of the longer path. Exact as long as extending two paths by the same edge keeps their order.
    """
    steps = len(cost)
    check_budget(computed, steps)
    best: dict[int, tuple[Value, list[int]]] = {0: (start, [0])}  # best path to each step, with as many edges as rounds
    for _ in range(computed - 1):
        longer: dict[int, tuple[Value, list[int]]] = {}
        for j in range(1, steps):
            reached = [(extend(value, cost[i][j]), path) for i, (value, path) in best.items() if _is_edge(cost, i, j)]
            if reached:
                value, path = min(reached)
                longer[j] = (value, [*path, j])
        best = longer
    ended = [(extend(value, cost[i][steps]), path) for i, (value, path) in best.items() if _is_edge(cost, i, steps)]
    if not ended:
        raise PolicyError(
            f"No schedule computes exactly {computed} of {steps} steps along edges of finite cost; "
            "give another number of computed steps, or allow longer runs of skipped ones."
        )
    return min(ended)[1]


def _is_edge(cost: Sequence[Sequence[float]], i: int, j: int) -> bool:
    return i < j and cost[i][j] < float("inf")
