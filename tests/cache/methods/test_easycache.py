"""EasyCache: rate, estimate and sum against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dit_accel.cache.gate import GateState, decide
from dit_accel.cache.methods.easycache import PUBLISHED, cache, transformation_rate
from dit_accel.cache.schedule import must_compute
from dit_accel.state import BranchState

Replay = Callable[..., str]


def test_rate_and_estimate_by_hand() -> None:
    latent, latent_before = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0])  # mean change 1
    output, output_before = torch.tensor([8.0, -2.0]), torch.tensor([5.0, -1.0])  # mean change 2
    assert transformation_rate(output, output_before, latent, latent_before).item() == 2.0
    # kept over the output's size: times a change of the latent by .5 it is 2 * .5 / mean |(8, 2)| = 2 * .5 / 5
    state = BranchState()
    state.note_rate(latent_before, output_before)
    assert state.rate is None, "one computed step has no rate"
    state.note_rate(latent, output)
    assert state.rate is not None
    assert state.rate.item() * 0.5 == pytest.approx(0.2)


def test_replay_by_hand(replay: Replay) -> None:
    # sums from step 2 on: .02 .04 .06 -> computed, .03, then the last one
    assert replay(cache(0.05, first=2), [None, 0.0, 0.02, 0.02, 0.02, 0.03, 0.01]) == "CC..C.C"
    assert replay(cache(0.0, first=1), [None, 0.0, 0.0, 0.0]) == "CCCC"


def test_the_published_settings_compute_their_first_steps(replay: Replay) -> None:
    assert replay(cache(*PUBLISHED["wan2.1"]), [None] + [0.001] * 13) == "C" * 10 + "...C"
    assert replay(cache(*PUBLISHED["hunyuan-video"]), [None] + [0.02] * 9) == "CCCCC.C.CC"  # .02 + .02 >= .025


@pytest.mark.parametrize("error", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(error: float | None) -> None:
    assert decide(cache(1.0, first=1), GateState(accumulated=0.5, skips=1), error, 3, 9).compute


def test_an_unknown_number_of_steps_guards_no_last_one() -> None:
    assert must_compute(cache(1.0, first=1), 99, None, 0) is None
    assert must_compute(cache(1.0, first=1), 99, 1, 0) == "tail"


def test_the_conditional_branch_decides() -> None:
    assert cache().branches == "first"
