"""TaylorSeer: full steps of the published code and of diffusers, and the forecast of a straight line."""

from __future__ import annotations

import pytest

from dit_accel.cache.methods.taylorseer import (
    PUBLISHED,
    DiffusersSettings,
    TaylorSeerSettings,
    TaylorSeerState,
    decide,
    decide_diffusers,
    forecast_weights,
)


def full_steps(settings: TaylorSeerSettings, steps: int) -> list[int]:
    state, full = TaylorSeerState(), []
    for step in range(steps):
        compute, state = decide(settings, state, step)
        full += [step] * compute
    return full


def full_steps_diffusers(settings: DiffusersSettings, steps: int) -> list[int]:
    state, full = TaylorSeerState(), []
    for step in range(steps):
        compute, state = decide_diffusers(settings, state, step)
        full += [step] * compute
    return full


def test_full_steps_of_the_published_code() -> None:
    # three at the start, then five forecasts between full steps: 2 + 6 = 8, 14, ...
    assert full_steps(PUBLISHED["flux"], 28) == [0, 1, 2, 8, 14, 20, 26]
    assert full_steps(PUBLISHED["wan2.1"], 12) == [0, 5, 10]
    assert full_steps(TaylorSeerSettings(1), 5) == [0, 1, 2, 3, 4]
    assert full_steps(TaylorSeerSettings(3, first=0), 7) == [0, 3, 6], "nothing to forecast from at the first step"


def test_full_steps_of_diffusers() -> None:
    assert full_steps_diffusers(DiffusersSettings(), 16) == [0, 1, 2, 4, 9, 14]
    assert full_steps_diffusers(DiffusersSettings(after=12), 16) == [0, 1, 2, 4, 9, 12, 13, 14, 15]
    assert full_steps_diffusers(DiffusersSettings(interval=1), 6) == list(range(6))
    assert full_steps_diffusers(DiffusersSettings(interval=4, before=0), 7)[:2] == [0, 1]


def test_as_many_anchors_as_the_order_can_use() -> None:
    state = TaylorSeerState()
    for step in range(9):
        _, state = decide(TaylorSeerSettings(6, order=1, first=3), state, step)
    assert state == TaylorSeerState((2, 8))


def test_a_line_is_forecast_exactly() -> None:
    # 3 + 2 t at 2 and 8 is 7 and 19; at 11 it is 25
    before, newest = forecast_weights((2, 8), 11, 1)
    assert before * 7 + newest * 19 == pytest.approx(25.0)
    # order 2 on t^2 at 0, 3, 6, asked at 8, as published: D1 = 9, D2 = (9 - 3) / 3 = 2; 36 + 9 * 2 + 2 * 4 / 2 = 58
    weights = forecast_weights((0, 3, 6), 8, 2)
    assert sum(w * t * t for w, t in zip(weights, (0, 3, 6))) == pytest.approx(58.0)
    assert forecast_weights((5,), 7, 1) == [1.0]
