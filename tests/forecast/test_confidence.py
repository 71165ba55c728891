"""Confidence: what forecasts and plain reuse missed, older misses faded, and which of the two it makes stand in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_accel
from dit_accel import BlockCache, Forecast, Policy, PolicyError
from dit_accel.cache import Schedule, Scope
from dit_accel.forecast.confidence import Confidence, learn
from dit_accel.testing import tiny_pipelines

MASK = "1111" + "001" * 6


def test_misses_are_relative_and_fade() -> None:
    value = torch.tensor([3.0, 4.0])
    first = learn(None, value, value + torch.tensor([0.5, 0.0]), torch.tensor([3.0, 3.0]))
    assert (float(first.forecast), float(first.reuse)) == pytest.approx((0.1, 0.2))
    assert bool(first.holds(1.0)) and bool(first.holds(0.5)) and not bool(first.holds(0.49))
    second = learn(first, value, value + torch.tensor([5.0, 0.0]), value)
    assert (float(second.forecast), float(second.reuse)) == pytest.approx((0.05 + 1.0, 0.1))
    assert not bool(second.holds(10.0)) and bool(second.holds(10.6))


def test_what_is_no_number_is_not_trusted() -> None:
    nan = torch.full((2,), torch.nan)
    assert not bool(learn(None, torch.ones(2), nan, torch.ones(2)).holds(1.0))
    assert bool(learn(None, torch.ones(2), torch.ones(2), torch.ones(2)).holds(0.0)), "neither misses anything"
    assert not bool(Confidence(torch.tensor(1.0), torch.tensor(0.0)).holds(1e6))


def test_misses_are_taken_in_full_precision() -> None:
    value = torch.full((4,), 300.0, dtype=torch.float16)  # whose square is beyond float16
    known = learn(None, value, value * 1.01, value * 1.1)
    assert float(known.forecast) == pytest.approx(0.01, rel=0.05) and float(known.reuse) == pytest.approx(0.1, rel=0.05)


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(PolicyError, match="confidence"):
        Forecast("newton", confidence=-1.0)


@pytest.mark.parametrize("settings", [{"predictor": "reuse", "order": 0}, {"predictor": "regressed"}, {"order": 0}])
def test_where_there_is_nothing_to_choose_it_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="leave it out"):
        Forecast(**settings, confidence=1.0)


def policy(forecast: Forecast | None, scope: Scope) -> Policy:
    probe = 0 if scope.is_model else 1
    return Policy(
        BlockCache(
            None, warmup=1, tail=0, max_skips=None, probe_blocks=probe, scope=scope, schedule=Schedule(mask=MASK)
        ),
        forecast,
    )


@pytest.mark.parametrize("scope", [Scope("model", "output"), Scope("stack"), Scope("layers")])
@pytest.mark.parametrize("name", ["flux_true_cfg", "sd3", "dit", "pixart_sigma", "wan22", "cogvideox", "hunyuan_video"])
def test_where_forecasts_miss_reuse_stands_in(name: str, scope: Scope) -> None:
    """Random weights bend so much from step to step that reuse is nearer: a trusted forecast must not be worse."""
    tiny = tiny_pipelines.build(name)
    plain = tiny_pipelines.call(tiny, len(MASK))

    def run(forecast: Forecast | None) -> tuple[float, float, set[str]]:
        with dit_accel.apply(tiny.pipe, policy(forecast, scope)) as session:
            made = tiny_pipelines.call(tiny, len(MASK))
            decisions = {step.decision for step in session.stats.steps}
            return float((made - plain).norm() / plain.norm()), session.stats.flops_share, decisions

    gated = run(Forecast("newton", order=2, confidence=1.0))
    reuse = run(Forecast("reuse", order=0))
    assert gated[1] == reuse[1] < 1.0, "the same steps are skipped"
    assert gated[0] <= 1.05 * reuse[0], (gated, reuse)


def test_a_line_is_trusted_and_a_zigzag_is_not() -> None:
    def decisions(values: list[float]) -> list[bool]:
        known, trusted = None, []
        for before, last, value in zip(values, values[1:], values[2:]):
            one = torch.tensor([value])
            known = learn(known, one, torch.tensor([2 * last - before]), torch.tensor([last]))
            trusted.append(bool(known.holds(1.0)))
        return trusted

    assert decisions([1.0, 2.0, 3.0, 4.0, 5.0]) == [True] * 3
    assert decisions([1.0, 2.0, 1.0, 2.0, 1.0]) == [False] * 3
    assert decisions([1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[-1], "old misses fade"
