"""CG-Taylor: the gate on the first block's forecast, and the anchors of both histories, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.cache.methods.cg_taylor import (
    PUBLISHED,
    CgTaylorSettings,
    CgTaylorState,
    decide,
    first_block_weights,
    forecast_error,
    last_block_weights,
)


def replay(settings: CgTaylorSettings, errors: list[float | None]) -> str:
    state, marks = CgTaylorState(), ""
    for step, error in enumerate(errors):
        compute, state = decide(settings, state, error, step, len(errors))
        marks += "C" if compute else "."
    return marks


def test_the_error_is_relative_to_what_was_computed() -> None:
    assert forecast_error(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0])).item() == pytest.approx(1 / 4)


def test_replay_by_hand() -> None:
    # five steps of warm-up (cnt > 4); errors are not summed: .1 .12 pass .13, .13 does not; the last is computed
    errors = [None, 0.0, 0.0, 0.0, 0.0, 0.1, 0.12, 0.13, 0.05, 0.0]
    assert replay(PUBLISHED["flux-fast"], errors) == "CCCCC..C.C"
    assert replay(PUBLISHED["flux"], errors) == "CCCCCCCCCC"
    assert replay(CgTaylorSettings(0.0, first=1), [None, 0.0, 0.0, 0.0]) == "CCCC"


@pytest.mark.parametrize("error", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(error: float | None) -> None:
    assert decide(CgTaylorSettings(9.0, first=1), CgTaylorState((4,)), error, 5, 20)[0]


def test_the_first_step_computes_without_any_warm_up() -> None:
    assert decide(CgTaylorSettings(9.0, first=0), CgTaylorState(), 0.0, 0, 20) == (True, CgTaylorState((0,)))


def test_the_other_branch_reads_the_verdict() -> None:
    skipped, state = decide(CgTaylorSettings(0.1, first=1), CgTaylorState((3, 4)), 0.05, 5, 20)
    assert (skipped, state) == (False, CgTaylorState((3, 4), compute=False))
    assert decide(CgTaylorSettings(0.1, first=1), state, 0.5, 6, 20) == (True, CgTaylorState((4, 6)))


def test_both_histories_share_their_anchors() -> None:
    settings, state = CgTaylorSettings(0.1, first=6, first_block_order=3), CgTaylorState()
    for step in range(6):
        _, state = decide(settings, state, None, step, 20)
    assert state.anchors == (2, 3, 4, 5)
    # order 1 from 4 and 5, asked at 7: -2 and 3
    assert last_block_weights(settings, state, 7) == pytest.approx([0.0, 0.0, -2.0, 3.0])
    assert sum(first_block_weights(settings, state, 7)) == pytest.approx(1.0)
    line = [w * t for w, t in zip(first_block_weights(settings, state, 7), state.anchors)]
    assert sum(line) == pytest.approx(7.0)
