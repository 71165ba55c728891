"""Masks and lists of computed steps say the same; paths are those that brute force finds."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from dit_accel.cache.methods.mask import best_path, check_budget, mask_of, steps_of
from dit_accel.errors import PolicyError


def test_a_mask_and_its_steps_are_inverse() -> None:
    mask = mask_of([3, 0], 5)
    assert mask == (True, False, False, True, False)
    assert steps_of(mask) == [0, 3]


@pytest.mark.parametrize("computed", [[], [1, 2], [0, 5], [-1, 0]])
def test_a_mask_begins_with_a_computed_step_and_ends_with_the_run(computed: list[int]) -> None:
    with pytest.raises(PolicyError, match="give numbers from 0 to 4, 0 among them"):
        mask_of(computed, 5)


def test_a_budget_that_does_not_fit_is_refused() -> None:
    check_budget(5, 5)
    with pytest.raises(PolicyError, match="6 in a run of 5; give 1 to 5"):
        check_budget(6, 5)
    with pytest.raises(PolicyError, match="A run of 2 steps is too short to compute the 3"):
        check_budget(3, 2, fewest=3)


@pytest.mark.parametrize("computed", range(1, 7))
def test_the_best_path_is_the_one_of_brute_force(computed: int) -> None:
    dice = random.Random(computed)
    cost = [[dice.random() for _ in range(7)] for _ in range(6)]
    paths = [(0, *rest) for rest in itertools.combinations(range(1, 6), computed - 1)]
    cheapest = min(paths, key=lambda path: sum(cost[i][j] for i, j in itertools.pairwise([*path, 6])))
    assert best_path(cost, computed, 0.0, float.__add__) == list(cheapest)


def test_a_path_along_forbidden_edges_is_refused() -> None:
    cost = [[math.inf] * 4 for _ in range(3)]
    cost[0][1] = cost[1][2] = cost[2][3] = 1.0
    assert best_path(cost, 3, 0.0, float.__add__) == [0, 1, 2]
    with pytest.raises(PolicyError, match="No schedule computes exactly 2 of 3 steps"):
        best_path(cost, 2, 0.0, float.__add__)
