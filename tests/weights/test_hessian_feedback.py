"""Codes under the Hessian against slow references: least squares anew, every code tried, normal equations, full SVD."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.weights.codebook import assign, universal
from dit_accel.weights.encode import (
    Encoded,
    data_free,
    encode_rows,
    fitted_scale,
    layer_codebook,
    look_up,
    root_mean_square,
    storable,
)
from dit_accel.weights.feedback import calibrate, descend, feedback, low_rank, newton_codebook
from dit_accel.weights.hessian import damped, output_error
from dit_accel.weights.rotation import block_of, draw_signs, rotate, rotate_hessian, unpack_signs, unrotate
from dit_accel.weights.scalar import gptq, round_to_nearest


def layer(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the damped Hessian of inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.arange(1, inputs + 1) ** -0.5
    x = torch.randn(8 * inputs, inputs, generator=generator) @ mix.T
    return torch.randn(outputs, inputs, generator=generator), damped(x.T @ x / len(x), 0.01)


def small_book(stages: int, entries: int, width: int) -> Tensor:
    sizes = torch.tensor([1.0, 0.4])[:stages].view(-1, 1, 1)
    return storable(torch.randn(stages, entries, width, generator=torch.Generator().manual_seed(5)) * sizes)


@pytest.mark.parametrize(("stages", "width"), [(1, 1), (1, 2), (2, 2), (1, 4)])
def test_feedback_is_least_squares_for_every_vector(stages: int, width: int) -> None:
    weight, metric = layer(6, 12)
    book, scale = small_book(stages, 8, width), root_mean_square(weight)
    made = feedback(weight, metric, book, scale)
    exact, left = metric.double(), weight.double().clone()
    for low in range(0, 12, width):
        here, later = slice(low, low + width), slice(low + width, 12)
        cost = torch.linalg.inv(torch.linalg.inv(exact[low:, low:])[:width, :width])  # later columns at their best
        half = torch.linalg.cholesky(cost)
        codes = assign(left[:, here] / scale.double().unsqueeze(1) @ half, book.double() @ half)
        assert torch.equal(codes, made.codes[:, :, low // width])
        put = look_up(codes.unsqueeze(2), book.double()) * scale.unsqueeze(1)
        error = left[:, here] - put
        if low + width < 12:
            left[:, later] += torch.linalg.solve(exact[later, later], exact[later, here] @ error.T).T
        left[:, here] = put
    assert torch.allclose(made.core(), left.float(), atol=1e-4)


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, metric = layer(16, 96)
    book = small_book(1, 16, 4)
    made = {}
    for size in (4, 20, 128):
        monkeypatch.setattr("dit_accel.weights.feedback._BLOCK", size)
        first = feedback(weight, metric, book, root_mean_square(weight))
        made[size] = (first.codes, descend(weight, metric, first).codes)
    for size in (4, 20):
        assert all((a != b).float().mean() < 0.01 for a, b in zip(made[size], made[128]))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_descent_finds_the_best_code_of_each_vector_in_turn(width: int) -> None:
    weight, metric = layer(5, 8)
    start = data_free(weight, small_book(1, 6, width))
    made = descend(weight, metric, start)
    codes = start.codes.clone()

    def losses(tried: Tensor) -> Tensor:
        left = weight - replace(start, codes=tried).core()
        return ((left @ metric) * left).sum(1)

    for place in range(8 // width):
        each = []
        for code in range(6):
            tried = codes.clone()
            tried[:, 0, place] = code
            each.append(losses(tried))
        codes[:, 0, place] = torch.stack(each).argmin(0)
    assert torch.equal(made.codes, codes)
    assert float(losses(made.codes).sum()) < float(losses(start.codes).sum())


def test_no_sweep_makes_any_row_worse() -> None:
    weight, metric = layer(24, 64)
    made = data_free(weight, universal("256x4+256x4"))
    before = torch.full((24,), torch.inf)
    for _ in range(4):
        left = weight - made.core()
        now = ((left @ metric) * left).sum(1)
        assert (now <= before * (1 + 1e-4)).all()
        made, before = descend(weight, metric, made), now


def test_newton_solves_the_normal_equations() -> None:
    weight, metric = layer(30, 16)
    start = data_free(weight, small_book(1, 6, 2))
    made = newton_codebook(weight, metric, start, steps=12)  # as many as unknowns
    places = torch.nn.functional.one_hot(start.codes[:, 0], 6).double() * start.row_scale.view(-1, 1, 1)
    design = torch.einsum("ogk,de->ogdke", places, torch.eye(2, dtype=torch.float64)).reshape(30 * 16, 12)
    half = torch.linalg.cholesky(metric.double())
    seen = (design.view(30, 16, 12).transpose(1, 2) @ half).transpose(1, 2).reshape(-1, 12)
    solved = torch.linalg.lstsq(seen, (weight.double() @ half).reshape(-1, 1)).solution.view(6, 2)
    assert torch.allclose(made.codebook[0].double(), solved, rtol=0.005, atol=1e-3)
    assert output_error(weight, made.core(), metric) < output_error(weight, start.core(), metric)


def test_newton_leaves_codewords_that_nobody_uses() -> None:
    weight, metric = layer(4, 8)
    book = torch.cat([small_book(1, 4, 2), torch.full((1, 1, 2), 50.0)], 1)
    made = newton_codebook(weight, metric, data_free(weight, book))
    assert made.codebook[0, 4].tolist() == [50.0, 50.0]
    assert torch.isfinite(made.codebook).all()


def test_the_scale_is_the_best_one() -> None:
    weight, metric = layer(3, 8)
    shape = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    for hessian in (None, metric, metric.diagonal()):
        best = fitted_scale(weight, shape, hessian)
        full = torch.eye(8) if hessian is None else hessian if hessian.ndim == 2 else torch.diag(hessian)
        for factor in (0.95, 1.05):
            worse = [
                ((weight - s.unsqueeze(1) * shape) @ full * (weight - s.unsqueeze(1) * shape)).sum(1)
                for s in (best, best * factor)
            ]
            assert (worse[0] < worse[1]).all()
        assert torch.equal(best, storable(best))


def test_low_rank_is_the_truncated_svd_under_the_hessian() -> None:
    left, metric = layer(40, 32)
    first, second = low_rank(left, metric, 3)
    assert (first.shape, second.shape) == ((3, 32), (40, 3))
    lower = torch.linalg.cholesky(metric.double())
    sizes = torch.linalg.svdvals(left.double() @ lower)
    rest = (left - second @ first).double() @ lower
    assert float(rest.square().sum()) == pytest.approx(float(sizes[3:].square().sum()), rel=1e-3)
    plain = low_rank(left, torch.eye(32), 3)
    assert float(((left - plain[1] @ plain[0]).double() @ lower).square().sum()) > 1.02 * float(rest.square().sum())
    with pytest.raises(ArgumentError, match="give 1 to 32"):
        low_rank(left, metric, 33)


def test_importance_decides_between_codewords() -> None:
    weight, book = torch.tensor([[0.6, 0.4]]), torch.tensor([[[0.0, 0.4], [0.6, 0.0]]])
    assert encode_rows(weight, torch.ones(1), book).tolist() == [[[1]]]
    assert encode_rows(weight, torch.ones(1), book, torch.tensor([1.0, 100.0])).tolist() == [[[0]]]


def test_rows_of_zeros_stay_zeros() -> None:
    weight, metric = layer(4, 16)
    weight[1] = 0.0
    for made in (data_free(weight, universal("256x4")), calibrate(weight, metric, universal("256x4"), newton=True)):
        assert not made.dense()[1].any()
        assert torch.isfinite(made.dense()).all()


def test_which_part_helps() -> None:
    """The order of the research table: heavy tails, row scales, a low-rank part, inputs with a few hot channels."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    outputs, inputs = 192, 256
    tails = normal(outputs, inputs) / (sum(normal(outputs, inputs) ** 2 for _ in range(6)) / 6).sqrt()
    weight = 0.02 * (tails * torch.exp(0.4 * normal(outputs, 1)) + 0.1 * normal(outputs, 8) @ normal(8, inputs))
    turn, power = torch.linalg.qr(normal(inputs, inputs)).Q, torch.arange(1, inputs + 1) ** -0.5
    hot = torch.where(torch.randperm(inputs, generator=generator) < 6, 8.0, 1.0)
    seen, fresh = ((normal(4096, inputs) * power) @ turn.T * hot for _ in range(2))
    hessian, judge = seen.T @ seen / 4096, fresh.T @ fresh / 4096
    signs, block = unpack_signs(draw_signs(inputs, 0), inputs), block_of(inputs)
    turned, metric, book = rotate(weight, signs, block), rotate_hessian(hessian, signs, block), universal("256x4")
    own, diagonal = layer_codebook(weight, 256, 4), hessian.diagonal()

    def lost(dense: Tensor) -> float:
        return output_error(weight, dense, judge)

    def back(made: Encoded) -> float:
        return lost(unrotate(made.dense(), signs, block))

    free = back(data_free(turned, book))
    weighted = layer_codebook(weight, 256, 4, importance=diagonal)
    by_diagonal = lost(data_free(weight, weighted, importance=diagonal).dense())
    kmeans_feedback = lost(calibrate(weight, hessian, own, sweeps=0).dense())
    plain = back(calibrate(turned, metric, book, sweeps=0))
    swept = back(calibrate(turned, metric, book))
    ranks = [back(calibrate(turned, metric, book, rank=rank, order="after")) for rank in (8, 16)]
    best = back(calibrate(turned, metric, book, rank=16))
    assert best <= ranks[1] * 1.01 < ranks[0] < swept < plain < by_diagonal < free
    assert swept < kmeans_feedback < by_diagonal
    assert free < lost(round_to_nearest(weight, 2).dense())
    assert swept < 0.6 * lost(gptq(weight, hessian, 2).dense())
    assert ranks[1] < 1.1 * lost(gptq(weight, hessian, 3).dense())


def test_what_does_not_fit() -> None:
    weight, metric = layer(4, 10)
    book = universal("256x4")
    for call in (
        lambda: feedback(weight, metric, book, root_mean_square(weight)),
        lambda: data_free(weight, book),
        lambda: layer_codebook(weight, 4, 4),
        lambda: encode_rows(weight[0], weight[:, 0], book),
    ):
        with pytest.raises(ArgumentError, match="whole vectors of 4"):
            call()
    with pytest.raises(ArgumentError, match=r"takes \[10, 10\]"):
        calibrate(weight, metric[:8, :8], book)
