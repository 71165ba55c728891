"""Weights from the probe: DiCache's alignment by hand, and the regression against mixtures that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel.forecast import Forecast
from dit_accel.forecast.evidence import (
    LARGEST_SUM,
    Evidence,
    aligned_weights,
    alignment,
    anchor_weights,
    regressed_weights,
)
from dit_accel.forecast.predictors import weights_for

U = [0.0, 1.0, 4.0]
PRIOR = [0.0, -0.5, 1.5]


def probes(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(2, 16, 8, generator=generator) for _ in range(count)]


def mixture(weights: list[float], anchors: list[Tensor]) -> Tensor:
    return torch.stack([w * anchor for w, anchor in zip(weights, anchors, strict=True)]).sum(dim=0)


def test_gamma_and_its_weights() -> None:
    older, newest = torch.zeros(2), torch.ones(2)
    assert alignment(torch.tensor([1.2, 1.2]), newest, older).item() == pytest.approx(1.2)
    assert anchor_weights(1.2) == pytest.approx([-0.2, 1.2])
    assert anchor_weights(0.3) == [0.0, 1.0]  # never behind the newest anchor
    assert anchor_weights(7.0) == anchor_weights(math.inf) == [-0.5, 1.5]
    assert anchor_weights(math.nan) == [0.0, 1.0]
    assert anchor_weights(None) == [1.0]
    assert math.isnan(alignment(older, older, older).item())


def test_alignment_looks_at_the_two_newest_anchors() -> None:
    older, newest, now = torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.full((1, 2, 3), 1.2)
    assert aligned_weights(U[:2], Evidence(now, [older, newest])) == pytest.approx([-0.2, 1.2])
    assert aligned_weights(U, Evidence(now, [now, older, newest])) == pytest.approx([0.0, -0.2, 1.2])
    # the distance has no sign: 1.2 steps back look like 1.2 steps on
    assert aligned_weights(U[:2], Evidence(-now, [older, newest])) == pytest.approx([-0.2, 1.2])


def test_alignment_without_two_anchors_or_without_evidence_reuses_the_newest() -> None:
    probe = torch.ones(1, 2, 3)
    assert aligned_weights([4.0], Evidence(2 * probe, [probe])) == [1.0]
    assert aligned_weights(U, None) == [0.0, 0.0, 1.0]
    assert aligned_weights(U[:2], Evidence(probe, [probe, probe])) == [0.0, 1.0], "equal probes say nothing"


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.1, 10.0])
def test_the_regression_keeps_the_sum_of_the_prior(ridge: float) -> None:
    now, *anchors = probes(4)
    weights = regressed_weights(PRIOR, Evidence(now, anchors), ridge)
    assert weights != PRIOR
    assert sum(weights) == pytest.approx(1.0)


def test_the_regression_by_hand() -> None:
    # p_0 = (0, 0), p_1 = (2, 0), now (3, 0); w = (z, 1 - z) leaves (1 + 2 z)^2, and with mean |p|^2 = 2 the penalty is
    # ridge * 2 * 2 z^2: z = -1 / (2 + 2 ridge)
    evidence = Evidence(torch.tensor([3.0, 0.0]), [torch.tensor([0.0, 0.0]), torch.tensor([2.0, 0.0])])
    assert regressed_weights([0.0, 1.0], evidence, 0.0) == pytest.approx([-0.5, 1.5])
    assert regressed_weights([0.0, 1.0], evidence, 1.0) == pytest.approx([-0.25, 1.25])
    assert regressed_weights([0.0, 1.0], evidence, 1e9) == pytest.approx([0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("exact", [[0.25, -0.5, 1.25], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [-0.75, 0.0, 1.75]])
def test_an_exact_mixture_is_recovered(exact: list[float]) -> None:
    anchors = probes(3)
    assert regressed_weights(PRIOR, Evidence(mixture(exact, anchors), anchors), 1e-9) == pytest.approx(exact, abs=1e-4)


def test_without_evidence_it_is_the_prior() -> None:
    now, anchor = probes(2)
    assert regressed_weights(PRIOR, None, 0.1) == PRIOR
    assert regressed_weights([1.0], Evidence(now, [anchor]), 0.1) == [1.0]
    # nothing to measure the ridge by
    assert regressed_weights(PRIOR, Evidence(now, [torch.zeros_like(now)] * 3), 0.1) == PRIOR
    # and the prior explains this probe as it is
    anchors = probes(3)
    assert regressed_weights(PRIOR, Evidence(mixture(PRIOR, anchors), anchors), 0.1) == pytest.approx(PRIOR, abs=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_probe_that_is_not_finite_is_no_evidence(place: int, broken: float) -> None:
    every = probes(4)
    every[place][1, 4, 3] = broken  # of a token that is looked at, as every fourth is
    assert regressed_weights(PRIOR, Evidence(every[0], every[1:]), 0.1) == PRIOR


def test_weights_that_would_amplify_noise_are_not_taken() -> None:
    anchors = probes(2)
    far = Evidence(mixture([-2.0, 3.0], anchors), anchors)  # |w| of 5
    assert LARGEST_SUM < 5
    assert regressed_weights([0.0, 1.0], far, 1e-9) == [0.0, 1.0]
    assert regressed_weights([-2.5, 3.5], far, 1e-9) == pytest.approx([-2.0, 3.0], abs=1e-4), (
        "no more than the prior's own"
    )


def test_every_fourth_token_is_looked_at() -> None:
    anchors = probes(3)
    now = mixture([0.25, -0.5, 1.25], anchors)
    seen = regressed_weights(PRIOR, Evidence(now, anchors), 0.01)
    now[:, 1::4], now[:, 2::4], now[:, 3::4] = 9.0, -9.0, math.nan
    assert regressed_weights(PRIOR, Evidence(now, anchors), 0.01) == pytest.approx(seen)


def test_the_prior_of_the_predictor_is_a_polynomial_in_time() -> None:
    line = Forecast("regressed", order=1)
    assert weights_for(line, [1.0, 4.0], 6.0) == pytest.approx([-2 / 3, 5 / 3])
    anchors = probes(2)
    exact = Evidence(mixture([-0.25, 1.25], anchors), anchors)
    assert weights_for(Forecast("regressed", order=1, ridge=1e-9), [1.0, 4.0], 6.0, evidence=exact) == pytest.approx(
        [-0.25, 1.25], abs=1e-4
    )
