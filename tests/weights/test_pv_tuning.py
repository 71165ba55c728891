"""PV-Tuning on one layer: a V step by hand, what may move, and losses that never rise."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.weights.codebook import universal
from dit_accel.weights.encode import Encoded, data_free
from dit_accel.weights.hessian import output_error
from dit_accel.weights.pv_tuning import continuous_step, discrete_step, tune

BOOK = torch.tensor([[[0.0], [1.0], [2.0]]])


def layer() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator) * torch.arange(1, 65) ** -0.5
    x = torch.randn(512, 64, generator=generator) @ mix.T
    return torch.randn(48, 64, generator=generator), x.T @ x / 512


def test_a_discrete_step_by_hand() -> None:
    aim = torch.tensor([[10.0, 20.0, 0.0, 10.0]])
    start = Encoded(torch.tensor([[[0, 0, 0, 1]]]), torch.tensor([10.0]), BOOK)

    def loss(weight: Tensor) -> Tensor:
        return (weight - aim).square().sum()

    # Slopes -20 -40 0 0: the one of largest slope alone; then both, by as much as their slopes say.
    assert discrete_step(start, loss, share=0.25, step=4.0).codes.tolist() == [[[0, 0, 0, 1]]], "no size, no step"
    start = replace(start, codes=torch.tensor([[[0, 1, 0, 1]]]))  # slopes -20 -20 0 0
    assert discrete_step(start, loss, share=0.5, step=1.0).codes.tolist() == [[[1, 2, 0, 1]]]
    start = replace(start, codes=torch.tensor([[[2, 1, 2, 1]]]))  # slopes 20 -20 40 0
    assert discrete_step(start, loss, share=0.25, step=1.0).codes.tolist() == [[[2, 1, 0, 1]]]


def test_rows_of_small_scale_move_further() -> None:
    start = Encoded(torch.tensor([[[1]], [[1]]]), torch.tensor([10.0, 1.0]), BOOK)
    aim = torch.tensor([[20.0], [11.0]])  # slopes -20 both: -2 and -20 before scaling
    made = discrete_step(start, lambda w: (w - aim).square().sum(), share=1.0)
    assert made.codes.tolist() == [[[1]], [[2]]]


def test_a_rate_too_large_changes_nothing() -> None:
    weight, _ = layer()
    start = data_free(weight, universal("256x4"))
    made = continuous_step(start, lambda w: (w - weight).square().sum(), 3, rate=10.0)
    assert torch.equal(made.codebook, start.codebook)
    assert torch.equal(made.row_scale, start.row_scale)


def test_a_step_that_does_not_help_is_not_taken() -> None:
    weight, _ = layer()
    start = data_free(weight, universal("256x4"))
    codes = start.codes

    def loss(made: Tensor) -> Tensor:
        return (made - start.dense()).square().sum() + 1e-3 * made.sum()

    assert torch.equal(discrete_step(start, loss, share=1.0, step=64.0, halvings=2).codes, codes)
    flat = discrete_step(start, lambda made: 0.0 * made.sum())
    assert torch.equal(flat.codes, codes)


@pytest.mark.parametrize("name", ["256x4", "64x2"])
def test_few_vectors_move_and_the_loss_falls_with_every_step(name: str) -> None:
    weight, hessian = layer()
    made = data_free(weight, universal(name))

    def loss(tried: Tensor) -> Tensor:
        return (((weight - tried) @ hessian) * (weight - tried)).sum()

    values = [float(loss(made.dense()))]
    for _ in range(3):
        smooth = continuous_step(made, loss, 4)
        assert torch.equal(smooth.codes, made.codes)
        values.append(float(loss(smooth.dense())))
        made = discrete_step(smooth, loss, share=0.05)
        changed = (made.codes != smooth.codes).any(1)
        assert 0 < int(changed.sum()) <= 0.05 * changed.numel()
        values.append(float(loss(made.dense())))
        assert torch.equal(made.codebook, smooth.codebook)
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)


def test_a_residual_codebook_gets_no_worse() -> None:
    weight, hessian = layer()
    start = data_free(weight, universal("256x4+256x4"))
    made = tune(start, lambda tried: (((weight - tried) @ hessian) * (weight - tried)).sum(), 3)
    assert made.codes.shape == start.codes.shape
    assert output_error(weight, made.dense(), hessian) < output_error(weight, start.dense(), hessian)


def test_tuning_gains_what_neither_step_gains_alone() -> None:
    weight, hessian = layer()
    start = data_free(weight, universal("256x4"))

    def loss(tried: Tensor) -> Tensor:
        return (((weight - tried) @ hessian) * (weight - tried)).sum()

    def lost(made: Encoded) -> float:
        return output_error(weight, made.dense(), hessian)

    both = lost(tune(start, loss, 40))
    codes_alone = lost(tune(start, loss, 40, continuous_steps=0))
    smooth_alone = lost(continuous_step(start, loss, 200))
    assert both < 0.95 * min(codes_alone, smooth_alone)
    assert max(codes_alone, smooth_alone) < lost(start)
    with pytest.raises(ArgumentError, match="share of 0"):
        discrete_step(start, loss, share=0.0)
