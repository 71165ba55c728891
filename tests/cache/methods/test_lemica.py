"""LeMiCa and CEM against brute force, and on a graph small enough for the eye."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dit_accel.cache import Schedule
from dit_accel.cache.methods.lemica import cache, cosine_costs, cumulative_schedule, limit_skips, minimax_schedule
from dit_accel.cache.methods.mask import steps_of
from dit_accel.errors import PolicyError

Replay = Callable[..., str]

INF = math.inf
# Four steps and the end. With two computed steps: 0 1 E: 0 + 9; 0 2 E: 3 + 5; 0 3 E: 7 + 0.
COST = [[INF, 0.0, 3.0, 7.0, 20.0], [INF, INF, 0.0, 4.0, 9.0], [INF, INF, INF, 0.0, 5.0], [INF, INF, INF, INF, 0.0]]


def edges_of(path: tuple[int, ...], cost: list[list[float]]) -> list[float]:
    return [cost[i][j] for i, j in itertools.pairwise([*path, len(cost)])]


def test_the_two_orders_differ() -> None:
    assert steps_of(minimax_schedule(COST, 2)) == [0, 2], "worst edge 5, not 7 or 9"
    assert steps_of(cumulative_schedule(COST, 2)) == [0, 3], "7 in all, not 8 or 9"


@pytest.mark.parametrize("computed", range(1, 8))
@pytest.mark.parametrize("seed", range(3))
def test_both_find_what_brute_force_finds(computed: int, seed: int) -> None:
    dice = random.Random(seed)
    # few different costs, so that many paths share their worst edge and the second worst has to decide
    cost = [[dice.choice([0.0, 1.0, 2.0, 4.0]) if i < j else INF for j in range(8)] for i in range(7)]
    paths = [(0, *rest) for rest in itertools.combinations(range(1, 7), computed - 1)]
    found = edges_of(tuple(steps_of(minimax_schedule(cost, computed))), cost)
    assert sorted(found, reverse=True) == min(sorted(edges_of(path, cost), reverse=True) for path in paths)
    found = edges_of(tuple(steps_of(cumulative_schedule(cost, computed))), cost)
    assert sum(found) == min(sum(edges_of(path, cost)) for path in paths)


@pytest.mark.parametrize("find", [minimax_schedule, cumulative_schedule])
def test_the_ends_of_the_budget(find) -> None:
    assert find(COST, 4) == (True, True, True, True)
    assert find(COST, 1) == (True, False, False, False)
    for computed in (0, 5):
        with pytest.raises(PolicyError, match=f"is {computed} in a run of 4; give 1 to 4"):
            find(COST, computed)


def test_runs_of_skips_can_be_limited() -> None:
    assert steps_of(cumulative_schedule(limit_skips(COST, 1), 2)) == [0, 2], "0 3 E skips two steps in a row"
    with pytest.raises(PolicyError, match="allow longer runs"):
        cumulative_schedule(limit_skips(COST, 0), 3)


def test_costs_are_sums_of_cosine_distances() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])  # cosines 0-1: 0; 0-2: -1; 1-2: 0
    # from 0: nothing skipped 0; step 1: 1; steps 1, 2: 1 + 2. from 1: step 2: 1
    assert cosine_costs(features) == [[INF, 0.0, 1.0, 3.0], [INF, INF, 0.0, 1.0], [INF, INF, INF, 0.0]]
    assert steps_of(cumulative_schedule(cosine_costs(features), 2)) == [0, 1]


def test_the_first_run_measures_and_its_mask_decides(replay: Replay) -> None:
    assert (cache().schedule.calibrate, cache(0.3, "cem").schedule.calibrate) == ("lemica", "cem")
    assert cache(0.3).schedule.budget == 0.3
    # what a calibration finds is a mask: COST with two computed steps, as above
    for make, marks in ((minimax_schedule, "C.C."), (cumulative_schedule, "C..C")):
        mask = "".join("1" if compute else "0" for compute in make(COST, 2))
        assert replay(replace(cache(), schedule=Schedule(mask=mask)), [None] * 4) == marks
