"""SmoothCache on error tables worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dit_accel.cache.methods.mask import steps_of
from dit_accel.cache.methods.smoothcache import SmoothCache, cache, error_table, kind_mask, schedule
from dit_accel.errors import PolicyError

Replay = Callable[..., str]

# Eight steps; row j - 1 at i: how far step i + j is from step i.
ERRORS = [
    [0.30, 0.10, 0.10, 0.10, 0.10, 0.10, 0.10],
    [0.50, 0.25, 0.15, 0.15, 0.15, 0.15],
    [0.90, 0.40, 0.30, 0.18, 0.18],
]


@pytest.mark.parametrize(
    ("alpha", "computed"),
    [
        # 0: .90 .50 .30 all above -> next; 1: .40, .25 above, .10 -> skip 2; 3: .18 -> skip 4 5 6; 7
        (0.2, [0, 1, 3, 7]),
        # 0: .30 -> skip 1; 2: .30 -> skip 3 4 5; 6: only row 1 reaches the end, .10 -> skip 7, but the last is computed
        (0.3, [0, 2, 6, 7]),
        # 0: next; 1, 3, 5: .10 -> one skip each; 7
        (0.1, [0, 1, 3, 5, 7]),
        (0.09, list(range(8))),
        (0.0, list(range(8))),
        # 0: .90 -> skip 1 2 3; 4: .18 -> skip 5 6 7, but the last is computed
        (1.0, [0, 4, 7]),
    ],
)
def test_the_largest_look_back_within_alpha_is_skipped(alpha: float, computed: list[int]) -> None:
    assert steps_of(kind_mask(SmoothCache(alpha), ERRORS, 8)) == computed


def test_alpha_zero_never_skips_and_neither_does_an_error_that_is_no_number() -> None:
    assert all(kind_mask(SmoothCache(0.0), [[0.0, 0.0, 0.0]], 4))
    assert all(kind_mask(SmoothCache(9.0), [[math.nan, math.inf, math.nan]], 4))


def test_each_kind_has_its_own_mask() -> None:
    masks = schedule(SmoothCache(0.2), {"attention": [[0.1, 0.1, 0.1]], "feed_forward": [[0.3, 0.3, 0.1]]}, 4)
    assert masks == {"attention": (True, False, True, True), "feed_forward": (True, True, True, True)}


def test_errors_are_relative_to_the_later_step_and_averaged_over_blocks() -> None:
    first = torch.tensor([[1.0, -1.0], [2.0, -2.0], [4.0, -4.0]])  # doubles: j = 1: 1/2, 1/2; j = 2: 3/4
    second = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]])  # j = 1: 0, (2 + 2)/4 = 1; j = 2: 1
    table = error_table({"blocks.0": first, "blocks.1": second})
    assert table == [[0.25, 0.75], [0.875]]
    assert steps_of(kind_mask(SmoothCache(0.3), table, 3)) == [0, 2]


def test_a_run_of_one_or_two_steps_computes_all() -> None:
    assert error_table({"blocks.0": torch.ones(1, 2)}) == []
    assert kind_mask(SmoothCache(1.0), [], 1) == (True,)
    assert kind_mask(SmoothCache(1.0), [[0.1]], 2) == (True, True)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(PolicyError, match="alpha is -1"):
        SmoothCache(-1.0)
    with pytest.raises(PolicyError, match="entries for 9 steps"):
        kind_mask(SmoothCache(), ERRORS, 9)
    with pytest.raises(PolicyError, match=r"recorded over \[2, 3\] steps"):
        error_table({"a": torch.ones(2, 1), "b": torch.ones(3, 1)})
    with pytest.raises(PolicyError, match="0 blocks"):
        error_table({})


def test_the_first_run_measures() -> None:
    assert (cache(0.35).schedule.calibrate, cache(0.35).schedule.budget) == ("smoothcache", 0.35)
    assert cache().scope.skips_layer("attention") and cache().scope.skips_layer("mlp")


def test_the_masks_of_the_kinds_alone_decide(replay: Replay) -> None:
    # A look-back limits the run of one kind. Where attention (C.C.C.C) and MLP (CC.C.CC) take turns, a step at which
    # either is skipped follows another for longer than that, and no step has to be computed as a whole for it
    assert replay(cache(), [None] * 8) == "C......C"
