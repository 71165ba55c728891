"""DPCache: the cost by hand, the dynamic program against brute force, the published recursion beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_accel.cache.methods.dpcache import DPCache, best_schedule, cache, cost_tensor, forecast, published_schedule
from dit_accel.cache.methods.mask import Mask, steps_of
from dit_accel.errors import PolicyError
from dit_accel.forecast.weights import reuse_weights

Replay = Callable[..., str]


def random_cost(steps: int, seed: int) -> Tensor:
    return torch.rand(steps, steps, steps + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def price(mask: Mask, cost: Tensor, forced_first: int) -> float:
    path = [*steps_of(mask), len(mask)]
    edges = zip(path[forced_first - 2 :], path[forced_first - 1 :], path[forced_first:])
    return sum(cost[edge].item() for edge in edges)


def test_cost_of_a_line_is_zero_and_of_a_square_is_its_distance_from_the_line() -> None:
    t = torch.arange(6.0)
    line = cost_tensor(torch.stack([t, -2 * t], dim=1))
    assert line[1, 3, 6] == pytest.approx(0.0, abs=1e-12)
    square = cost_tensor((t**2)[:, None])
    # line through (0, 0) and (1, 1): 2, 3, 4, 5 against 4, 9, 16, 25 -> 2, 6, 12, 20
    assert square[0, 1].tolist() == pytest.approx([math.inf, math.inf, 0.0, 2.0, 8.0, 20.0, 40.0])
    # line through (1, 1) and (3, 9): 13, 17 against 16, 25 -> 3, 8
    assert square[1, 3].tolist() == pytest.approx([math.inf] * 4 + [0.0, 3.0, 11.0])
    assert square[3, 1].isinf().all() and square[2, 2].isinf().all()


def test_predictor_and_places_can_be_given() -> None:
    def reuse(anchors, asked):
        return reuse_weights(anchors, asked)

    features = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
    assert cost_tensor(features, reuse)[0, 1, 2:].tolist() == [0.0, 2.0, 7.0]  # 3 - 1; + 6 - 1
    assert cost_tensor(features, places=[0.0, 1.0, 3.0, 6.0])[0, 1, 4] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("forced_first", [2, 3])
@pytest.mark.parametrize("computed", range(3, 9))
def test_the_schedule_is_the_cheapest_of_all(forced_first: int, computed: int) -> None:
    settings, cost = DPCache(computed, forced_first), random_cost(8, computed)
    first = tuple(range(forced_first))
    choices = itertools.combinations(range(forced_first, 8), computed - forced_first)
    masks = [tuple(step in (*first, *rest) for step in range(8)) for rest in choices]
    best = best_schedule(settings, cost)
    assert sum(best) == computed
    assert all(best[:forced_first])
    assert price(best, cost, forced_first) == pytest.approx(min(price(mask, cost, forced_first) for mask in masks))


def test_the_published_recursion_never_beats_the_exact_one_and_sometimes_loses() -> None:
    lost = 0
    for seed in range(20):
        settings, cost = DPCache(5), random_cost(9, seed)
        exact, published = (price(find(settings, cost), cost, 3) for find in (best_schedule, published_schedule))
        assert exact <= published + 1e-12
        lost += exact < published - 1e-12
    assert lost


def test_the_published_recursion_by_hand() -> None:
    cost = torch.full((5, 5, 6), 9.0, dtype=torch.float64)
    # forced 0 1, then two of 2 3 4. Path 0 1 3 4 costs 1 + 0 + 0; 0 1 2 4 costs 0 + 2 + 3; 0 1 2 3 costs 0 + 0 + 5
    cost[0, 1, 2], cost[0, 1, 3], cost[1, 3, 4], cost[3, 4, 5] = 0.0, 1.0, 0.0, 0.0
    cost[1, 2, 4], cost[2, 4, 5], cost[1, 2, 3], cost[2, 3, 5] = 2.0, 3.0, 0.0, 5.0
    assert steps_of(best_schedule(DPCache(4, 2), cost)) == [0, 1, 3, 4]
    assert steps_of(published_schedule(DPCache(4, 2), cost)) == [0, 1, 3, 4]
    # with 1 -> 3 -> 4 at 1.5 the path to 4 by way of 3 costs 2.5, more than 2; only the last edge shows that it pays
    cost[1, 3, 4] = 1.5
    assert steps_of(best_schedule(DPCache(4, 2), cost)) == [0, 1, 3, 4]  # 1 + 1.5 + 0 < 5
    assert steps_of(published_schedule(DPCache(4, 2), cost)) == [0, 1, 2, 3]  # 4 keeps 2 + 3 = 5, as dear as 0 + 0 + 5


@pytest.mark.parametrize("find", [best_schedule, published_schedule])
def test_the_ends_of_the_budget(find) -> None:
    cost = random_cost(5, 0)
    assert find(DPCache(5), cost) == (True,) * 5
    assert find(DPCache(3), cost) == (True, True, True, False, False)
    with pytest.raises(PolicyError, match="is 6 in a run of 5; give 3 to 5"):
        find(DPCache(6), cost)
    with pytest.raises(PolicyError, match="A run of 2 steps is too short"):
        find(DPCache(2), random_cost(2, 0))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(PolicyError, match="forced_first is 1"):
        DPCache(5, 1)
    with pytest.raises(PolicyError, match=r"the shape \[5, 5, 5\]"):
        best_schedule(DPCache(4), torch.zeros(5, 5, 5))
    with pytest.raises(PolicyError, match="2 places for 3 steps"):
        cost_tensor(torch.zeros(3, 1), places=[0.0, 1.0])
    with pytest.raises(PolicyError, match="calibrate on finite features"):
        best_schedule(DPCache(4), cost_tensor(torch.full((6, 2), math.nan)))


def test_the_first_run_measures_and_the_forecast_is_that_of_the_cost(replay: Replay) -> None:
    assert (cache(0.4).schedule.calibrate, cache(0.4).schedule.budget) == ("dpcache", 0.4)
    assert (forecast().predictor, forecast().order, forecast().anchors) == ("newton", 1, 2)
    # three are always computed, as in the schedule
    assert cache().warmup == DPCache(5).forced_first
    assert replay(cache(), [None] * 6) == "CCC...", "without a mask, nothing else is held back"
