"""BAC: the schedule of a block against brute force, the bubbling union on a model of five modules."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch

from dit_accel.cache.methods.bac import (
    block_schedule,
    bubbling_union,
    cache,
    cosine_similarities,
    most_volatile,
    volatility,
)
from dit_accel.cache.methods.mask import steps_of
from dit_accel.errors import PolicyError

Replay = Callable[..., str]

ORDER = ["0.attention", "0.feed_forward", "1.attention", "1.feed_forward", "2.attention"]
FEED_FORWARD = {"0.feed_forward", "1.feed_forward"}
MASKS = {
    "0.attention": (True, False, False, False, False),
    "0.feed_forward": (True, True, False, False, False),
    "1.attention": (True, False, True, False, False),
    "1.feed_forward": (True, False, False, True, False),
    "2.attention": (True, False, False, False, True),
}


def total(similarity: list[list[float]], path: tuple[int, ...]) -> float:
    return sum(sum(similarity[i][i + 1 : j]) for i, j in itertools.pairwise([*path, len(similarity)]))


def test_updates_lie_where_the_similarity_is_lost() -> None:
    # steps 0 1 2 are alike, and so are 3 4: reuse within the groups gives .9 x 3, any other second update less
    similarity = [[0.9 if (i < 3) == (j < 3) else 0.1 for j in range(5)] for i in range(5)]
    assert steps_of(block_schedule(similarity, 2)) == [0, 3]
    assert steps_of(block_schedule(similarity, 1)) == [0]
    assert block_schedule(similarity, 5) == (True,) * 5


@pytest.mark.parametrize("updates", range(1, 8))
def test_the_schedule_is_the_best_of_all(updates: int) -> None:
    dice = random.Random(updates)
    similarity = [[dice.uniform(-1.0, 1.0) for _ in range(7)] for _ in range(7)]
    best = max(total(similarity, (0, *rest)) for rest in itertools.combinations(range(1, 7), updates - 1))
    assert total(similarity, tuple(steps_of(block_schedule(similarity, updates)))) == pytest.approx(best)


def test_similarities_are_cosines() -> None:
    table = cosine_similarities(torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    assert table == [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]


def test_volatility_is_the_mean_over_all_pairs() -> None:
    # steps 0, 1, 3: distances 1, 3, 2, each counted twice among nine pairs
    assert volatility(torch.tensor([[0.0, 0.0], [1.0, -1.0], [3.0, -3.0]])) == pytest.approx(12 / 9)
    assert volatility(torch.ones(4, 2)) == 0.0


def test_the_most_volatile_have_a_feed_forward_module_downstream() -> None:
    volatilities = {
        "0.attention": 2.0,
        "0.feed_forward": 5.0,
        "1.attention": 3.0,
        "1.feed_forward": 9.0,
        "2.attention": 9.0,
    }
    assert most_volatile(volatilities, ORDER, FEED_FORWARD, 2) == ["0.feed_forward", "1.attention"]
    assert most_volatile(volatilities, ORDER, FEED_FORWARD, 9) == ["0.attention", "0.feed_forward", "1.attention"]
    assert most_volatile(volatilities, ORDER, FEED_FORWARD, 0) == []
    assert most_volatile(volatilities, ORDER, (), 2) == []


def test_upstream_modules_follow_the_feed_forward_modules_behind_them() -> None:
    united = bubbling_union(MASKS, ORDER, FEED_FORWARD, {"1.attention"})
    assert united == {**MASKS, "1.attention": (True, False, True, True, False)}  # 2 of its own, 3 of 1.feed_forward


def test_unions_bubble_up_through_feed_forward_modules() -> None:
    united = bubbling_union(MASKS, ORDER, FEED_FORWARD, {"0.attention", "0.feed_forward"})
    assert united["0.feed_forward"] == (True, True, False, True, False)
    assert united["0.attention"] == (True, True, False, True, False)
    assert united["1.attention"] == MASKS["1.attention"]
    assert bubbling_union(MASKS, ORDER, FEED_FORWARD, ()) == MASKS


def test_wrong_input_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"rows of \[1, 2\] for 2 steps"):
        block_schedule([[1.0], [1.0, 1.0]], 1)
    with pytest.raises(PolicyError, match="is 3 in a run of 2"):
        block_schedule([[1.0, 1.0], [1.0, 1.0]], 3)
    with pytest.raises(PolicyError, match=r"'9\.attention', which is not in the order"):
        bubbling_union(MASKS, ORDER, FEED_FORWARD, {"9.attention"})
    with pytest.raises(PolicyError, match=r"no mask for '2\.attention'"):
        bubbling_union({name: MASKS[name] for name in ORDER[:4]}, ORDER, FEED_FORWARD, ())
    with pytest.raises(PolicyError, match="different lengths"):
        bubbling_union({**MASKS, "0.attention": (True,)}, ORDER, FEED_FORWARD, ())
    with pytest.raises(PolicyError, match="upstream modules is -1"):
        most_volatile({}, ORDER, FEED_FORWARD, -1)


def test_the_first_run_measures_and_the_masks_alone_decide(replay: Replay) -> None:
    assert (cache(0.2).schedule.calibrate, cache(0.2).schedule.budget) == ("bac", 0.2)
    assert cache().scope.skips_layer("attention") and cache().scope.skips_layer("mlp")
    assert replay(cache(), [None] * 12) == "C" + "." * 11
