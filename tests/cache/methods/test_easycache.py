"""EasyCache: rate, estimate and sum against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.cache.methods.easycache import (
    PUBLISHED,
    EasyCacheSettings,
    EasyCacheState,
    decide,
    error_estimate,
    transformation_rate,
)


def replay(settings: EasyCacheSettings, errors: list[float | None]) -> str:
    state, marks = EasyCacheState(), ""
    for step, error in enumerate(errors):
        compute, state = decide(settings, state, error, step, len(errors))
        marks += "C" if compute else "."
    return marks


def test_rate_and_estimate_by_hand() -> None:
    latent, latent_before = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0])  # mean change 1
    output, output_before = torch.tensor([8.0, -2.0]), torch.tensor([5.0, -1.0])  # mean change 2
    rate = transformation_rate(output, output_before, latent, latent_before)
    assert rate.item() == 2.0
    # 2 * mean |(0.5, 0.5)| / mean |(8, 2)| = 2 * 0.5 / 5
    assert error_estimate(rate, latent + 0.5, latent, output).item() == pytest.approx(0.2)


def test_replay_by_hand() -> None:
    # sums from step 2 on: .02 .04 .06 -> computed, .03, then the last one
    assert replay(EasyCacheSettings(0.05, first=2), [None, 0.0, 0.02, 0.02, 0.02, 0.03, 0.01]) == "CC..C.C"
    assert replay(EasyCacheSettings(0.0, first=1), [None, 0.0, 0.0, 0.0]) == "CCCC"


def test_the_published_settings_compute_their_first_steps() -> None:
    assert replay(PUBLISHED["wan2.1"], [None] + [0.001] * 13) == "C" * 10 + "...C"
    assert replay(PUBLISHED["hunyuan-video"], [None] + [0.02] * 9) == "CCCCC.C.CC"  # .02 + .02 >= .025


@pytest.mark.parametrize("error", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(error: float | None) -> None:
    assert decide(EasyCacheSettings(1.0, first=0), EasyCacheState(0.5), error, 3, 9) == (True, EasyCacheState())


def test_an_unknown_number_of_steps_guards_no_last_one() -> None:
    assert not decide(EasyCacheSettings(1.0, first=0), EasyCacheState(), 0.1, 99, None)[0]
