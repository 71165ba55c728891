"""Chebyshev: a constant stays, polynomials are exact without ridge, and the ridge pulls towards the mean."""

import pytest
import torch

from dit_accel.forecast.chebyshev import blended_weights, chebyshev_weights
from dit_accel.forecast.weights import newton_weights

NODES = [0.0, 1.0, 2.0, 5.0, 11.0]
LIMITS = (0.0, 49.0)


@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_constant_stays_as_it_is(ridge: float, count: int) -> None:
    assert sum(chebyshev_weights(NODES[:count], 14.0, 4, ridge, LIMITS)) == pytest.approx(1.0)


def test_without_ridge_polynomials_up_to_the_degree_are_exact() -> None:
    weights = chebyshev_weights(NODES, 14.0, 3, 0.0, LIMITS)
    assert sum(w * (t**3 - 2 * t) for w, t in zip(weights, NODES)) == pytest.approx(14**3 - 28)


def test_as_many_terms_as_anchors_without_ridge_is_newton() -> None:
    assert chebyshev_weights(NODES[:3], 7.0, 2, 0.0, LIMITS) == pytest.approx(newton_weights(NODES[:3], 7.0, 2))


def test_straight_line_by_hand() -> None:
    # Nodes 0 and 4 of limits 0 and 4 are -1 and 1: Phi^T Phi = diag(2, 2); with ridge 2 on T_1 the slope halves.
    assert chebyshev_weights([0.0, 4.0], 8.0, 1, 2.0, (0.0, 4.0)) == pytest.approx([0.5 - 0.75, 0.5 + 0.75])


def test_a_large_ridge_gives_the_mean() -> None:
    assert chebyshev_weights(NODES, 14.0, 4, 1e12, LIMITS) == pytest.approx([0.2] * 5, abs=1e-6)


def test_published_ridge_agrees_with_least_squares_done_otherwise() -> None:
    """Ridge is least squares on the table with sqrt(lambda) rows appended."""
    x = torch.tensor([2 * t / 49 - 1 for t in [*NODES, 14.0]], dtype=torch.float64)
    table = torch.stack([torch.cos(m * torch.arccos(x)) for m in range(5)], dim=1)
    penalty = 0.1**0.5 * torch.eye(5, dtype=torch.float64)[1:]
    values = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = torch.linalg.lstsq(
        torch.cat([table[:-1], penalty]), torch.cat([values, torch.zeros(4, dtype=torch.float64)])[:, None]
    ).solution[:, 0]
    weights = torch.tensor(chebyshev_weights(NODES, 14.0, 4, 0.1, LIMITS), dtype=torch.float64)
    assert float(weights @ values) == pytest.approx(float(table[-1] @ solution))


def test_blend_is_a_mixture_with_a_straight_line() -> None:
    half = blended_weights(NODES, 14.0, 4, 0.1, LIMITS, 0.5)
    smooth, straight = chebyshev_weights(NODES, 14.0, 4, 0.1, LIMITS), newton_weights(NODES, 14.0, 1)
    assert half == pytest.approx([(a + b) / 2 for a, b in zip(smooth, straight)])
