"""Methods: the schedules that the curves sweep."""

import itertools

import pytest

from dit_accel.bench.methods import grown


@pytest.mark.parametrize(
    ("steps", "gap", "expected"),
    [
        (12, 3, "111010010011"),  # 0 1 2 4 7 10, and the last
        (12, 1, "111111111111"),
        (3, 6, "111"),
        (1, 4, "1"),
    ],
)
def test_gaps_grow_and_the_ends_are_computed(steps: int, gap: int, expected: str) -> None:
    assert grown(steps, gap) == expected


@pytest.mark.parametrize("gap", [3, 4, 5, 6])
def test_no_gap_is_longer_than_asked_for(gap: int) -> None:
    computed = [step for step, sign in enumerate(grown(50, gap)) if sign == "1"]
    assert max(later - step for step, later in itertools.pairwise(computed)) == gap
