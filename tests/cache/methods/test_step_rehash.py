"""Key steps from a map of similarities, and lists that are carried over to runs of another length."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from dit_accel.cache import BlockCache
from dit_accel.cache.methods.step_rehash import (
    JENGA_IMAGE_TO_VIDEO,
    JENGA_STEPS,
    JENGA_TEXT_TO_VIDEO,
    StepRehash,
    cache,
    jenga,
    key_steps,
)
from dit_accel.errors import PolicyError

Replay = Callable[..., str]

SIMILARITY = [[1.0 - 0.1 * abs(i - j) for j in range(8)] for i in range(8)]


def computed_steps(replay: Replay, rule: BlockCache, steps: int) -> list[int]:
    return [step for step, mark in enumerate(replay(rule, [None] * steps)) if mark == "C"]


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        # .9, .8 above, .7 not -> 3; again -> 6; 7 is the last
        (StepRehash(0.75), [0, 3, 6, 7]),
        (StepRehash(0.75, max_skips=1), [0, 2, 4, 6, 7]),
        (StepRehash(0.75, max_skips=0), list(range(8))),
        (StepRehash(0.1), [0, 7]),
        (StepRehash(0.95), list(range(8))),
        (StepRehash(1.0), list(range(8))),
    ],
)
def test_a_key_step_is_one_that_no_longer_looks_like_the_last(settings: StepRehash, keys: list[int]) -> None:
    assert key_steps(settings, SIMILARITY) == keys


def test_threshold_one_never_skips_and_neither_does_a_similarity_that_is_no_number() -> None:
    assert key_steps(StepRehash(1.0), [[1.0 + 1e-9] * 4] * 4) == [0, 1, 2, 3]
    assert key_steps(StepRehash(-1.0), [[math.nan] * 4] * 4) == [0, 1, 2, 3]
    assert key_steps(StepRehash(0.5), [[1.0]]) == [0]


def test_the_lists_of_jenga() -> None:
    assert (len(JENGA_TEXT_TO_VIDEO), len(JENGA_IMAGE_TO_VIDEO)) == (23, 24)
    for keys in (JENGA_TEXT_TO_VIDEO, JENGA_IMAGE_TO_VIDEO):
        assert sorted(set(keys)) == list(keys)
        assert (keys[0], keys[-1]) == (0, JENGA_STEPS - 1)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"threshold is 1\.5"):
        StepRehash(1.5)
    with pytest.raises(PolicyError, match="max_skips is -1"):
        StepRehash(0.5, -1)
    with pytest.raises(PolicyError, match=r"rows of \[1\] for 2 steps"):
        key_steps(StepRehash(0.5), [[1.0], [1.0]])


def test_a_list_of_jenga_is_a_mask(replay: Replay) -> None:
    for keys in (JENGA_TEXT_TO_VIDEO, JENGA_IMAGE_TO_VIDEO):
        assert computed_steps(replay, jenga(keys), JENGA_STEPS) == list(keys)
        places = sorted({int(key * 29 / 49 + 0.5) for key in keys})  # a shorter run keeps them
        assert computed_steps(replay, jenga(keys), 30) == places
    assert computed_steps(replay, jenga(), 99)[:8] == [0, 1, 2, 3, 4, 5, 6, 7]  # 0, .5, 1 ... 3.5 round to 0 ... 4


def test_the_first_run_measures_and_the_last_step_is_a_key_step(replay: Replay) -> None:
    assert (cache(0.9).schedule.calibrate, cache(0.9).schedule.budget) == ("step-rehash", 0.9)
    assert replay(cache(), [None] * 6) == "C....C"
