"""Scalar baselines: levels by hand, GPTQ against least squares solved anew for every column."""

import pytest
import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.weights.hessian import damped, inverse_root, output_error, root
from dit_accel.weights.scalar import gptq, round_to_nearest


def layer(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.arange(1, inputs + 1) ** -0.5
    x = torch.randn(8 * inputs, inputs, generator=generator) @ mix.T
    return torch.randn(outputs, inputs, generator=generator), x.T @ x / len(x)


def test_levels_by_hand() -> None:
    made = round_to_nearest(torch.tensor([[0.0, 1.0, 1.6, 3.0, 10.0, 16.0]]), 2, group=4, clip=False)
    assert made.codes.tolist() == [[0, 1, 2, 3, 0, 3]]
    assert made.dense().tolist() == [[0, 1, 2, 3, 10, 16]]
    assert made.bits_per_weight == pytest.approx(2 + 32 * 2 / 6)
    assert round_to_nearest(torch.randn(4, 256), 3).bits_per_weight == 3.25


def test_clipping_looks_for_less_error() -> None:
    weight = torch.tensor([[-1.0, -0.5, 0.5, 1.0] * 8 + [9.0]])
    errors = [output_error(weight, round_to_nearest(weight, 2, clip=clip).dense()) for clip in (False, True)]
    assert errors[1] < errors[0]
    same = torch.full((2, 8), 0.3)
    assert torch.equal(round_to_nearest(same, 2).dense(), same)


def test_roots_are_roots() -> None:
    _, hessian = layer(1, 24)
    metric = damped(hessian, 0.01)
    lower, upper = root(metric), inverse_root(metric)
    assert torch.equal(lower, lower.tril())
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(lower @ lower.T, metric, atol=1e-4)
    assert torch.allclose(upper.T @ upper @ metric, torch.eye(24), atol=1e-3)


def test_inputs_never_seen_are_damped() -> None:
    hessian = torch.diag(torch.tensor([4.0, 0.0]))
    assert damped(hessian, 0.5).tolist() == [[5.0, 0.0], [0.0, 3.0]]
    assert damped(torch.zeros(2, 2), 0.01).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    singular = torch.ones(4, 4)
    assert torch.allclose(root(singular) @ root(singular).T, singular, atol=1e-2)
    with pytest.raises(ArgumentError, match="not positive"):
        root(-torch.eye(3))


@pytest.mark.parametrize("clip", [False, True])
def test_gptq_is_least_squares_for_every_column(clip: bool) -> None:
    weight, hessian = layer(6, 12)
    made = gptq(weight, hessian, 2, group=4, clip=clip)
    metric = damped(hessian, 0.01).double()
    left = weight.double().clone()
    for j in range(12):
        group = j // 4
        if j % 4 == 0:
            grid = round_to_nearest(left[:, j : j + 4].float(), 2, group=4, clip=clip)
            assert torch.allclose(made.scale[:, group], grid.scale[:, 0], atol=1e-4)
        scale, offset = made.scale[:, group].double(), made.offset[:, group].double()
        code = ((left[:, j] - offset) / scale).round().clamp(0, 3)
        assert torch.equal(code, made.codes[:, j].double())
        error = left[:, j] - (offset + scale * code)
        later = slice(j + 1, 12)
        if j < 11:  # d minimises (e, d) H (e, d)^T
            left[:, later] += torch.linalg.solve(metric[later, later], metric[later, j : j + 1] * error).T
        left[:, j] = offset + scale * code
    assert torch.allclose(made.dense(), left.float(), atol=1e-4)


def test_feedback_beats_rounding_where_inputs_hang_together() -> None:
    weight, hessian = layer(64, 256)
    for bits in (2, 3, 4):
        rounded = output_error(weight, round_to_nearest(weight, bits).dense(), hessian)
        assert output_error(weight, gptq(weight, hessian, bits).dense(), hessian) < 0.7 * rounded


def test_output_error_by_hand() -> None:
    weight, made = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]])
    assert output_error(weight, made) == pytest.approx(1 / 5)
    assert output_error(weight, made, torch.tensor([[1.0, 0.5], [0.5, 3.0]])) == pytest.approx(3 / 15)


def test_what_does_not_fit() -> None:
    weight, hessian = layer(2, 8)
    with pytest.raises(ArgumentError, match="give 2 to 8"):
        round_to_nearest(weight, 1)
    with pytest.raises(ArgumentError, match="Groups of 0"):
        round_to_nearest(weight, 2, group=0)
    with pytest.raises(ArgumentError, match=r"takes \[8, 8\]"):
        gptq(weight, hessian[:4, :4], 2)
    hessian[0, 0] = torch.nan
    with pytest.raises(ArgumentError, match="NaN"):
        gptq(weight, hessian, 2)
