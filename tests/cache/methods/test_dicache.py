"""DiCache: errors, sum and gamma against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.cache.methods.dicache import (
    PUBLISHED,
    DiCacheSettings,
    DiCacheState,
    alignment,
    anchor_weights,
    change,
    decide,
    error_of,
)


def replay(settings: DiCacheSettings, errors: list[float | None]) -> str:
    state, marks = DiCacheState(), ""
    for step, error in enumerate(errors):
        compute, state = decide(settings, state, error, step, len(errors))
        marks += "C" if compute else "."
    return marks


def test_the_two_errors() -> None:
    assert error_of(PUBLISHED["flux"], 0.05, 0.08) == 0.05
    assert error_of(PUBLISHED["flux-delta-minus"], 0.05, 0.08) == pytest.approx(0.03)
    assert change(torch.tensor([1.5, 2.5]), torch.tensor([1.0, 3.0])).item() == 0.25


def test_replay_by_hand() -> None:
    # ten steps, a fifth retained: 0, 1 and 2 (up to and with 2); sums .2 .4 -> computed (not below .4), .3, ...
    errors = [None, 0.2, 0.2, 0.2, 0.2, 0.3, 0.05, 0.1, 0.01, 0.01]
    # step 3: .2; 4: .4 C; 5: .3; 6: .35; 7: .45 C; 8: .01; 9: last
    assert replay(PUBLISHED["flux"], errors) == "CCC.C..C.C"
    assert replay(PUBLISHED["flux-delta-minus"], [0.01] * 6) == "C....C"
    assert replay(DiCacheSettings(0.0, retention=0.0), [0.0] * 5) == "CCCCC"


@pytest.mark.parametrize("error", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(error: float | None) -> None:
    assert decide(DiCacheSettings(9.0), DiCacheState(1.0), error, 8, 20) == (True, DiCacheState())


def test_gamma_and_its_weights() -> None:
    older, newest = torch.zeros(2), torch.ones(2)
    assert alignment(torch.tensor([1.2, 1.2]), newest, older).item() == pytest.approx(1.2)
    assert anchor_weights(1.2) == pytest.approx([-0.2, 1.2])
    assert anchor_weights(0.3) == [0.0, 1.0]  # never behind the newest anchor
    assert anchor_weights(7.0) == anchor_weights(math.inf) == [-0.5, 1.5]
    assert anchor_weights(math.nan) == [0.0, 1.0]
    assert anchor_weights(None) == [1.0]
    assert math.isnan(alignment(older, older, older).item())
