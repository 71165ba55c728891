"""VQ4DiT on one layer: candidates and ratios by hand, freezing, the loss of ratios, and what training gains."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.weights.encode import data_free, layer_codebook
from dit_accel.weights.hessian import output_error
from dit_accel.weights.vq4dit import FROZEN_LOGIT, candidates, encoded, freeze, harden, ratio_loss, train

BOOK = torch.tensor([[0.0], [1.0], [3.0]])


def test_candidates_and_ratios_by_hand() -> None:
    state = candidates(torch.tensor([[0.25, 2.5], [1.0, -1.0]]), BOOK, 2)
    assert state.codes.tolist() == [[0, 1], [2, 1], [1, 0], [0, 1]]
    assert state.logits[0].tolist() == pytest.approx([math.log(3), 0.0], abs=1e-4)
    ratios = state.ratios()
    assert ratios[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-4), "inverse distances"
    assert ratios[2, 0] > 0.9999, "a vector that is a codeword"
    soft = state.weight()
    assert soft.shape == (2, 2)
    assert float(soft[0, 0]) == pytest.approx(0.25, abs=1e-4)
    assert float(soft[0, 1]) == pytest.approx(0.75 * 3 + 0.25 * 1, abs=1e-4)


def test_row_scales_and_one_candidate() -> None:
    state = candidates(torch.tensor([[5.0, 10.0]]), BOOK, 1, torch.tensor([10.0]))
    assert state.codes.tolist() == [[0], [1]]
    assert state.ratios().tolist() == [[1.0], [1.0]]
    assert state.weight().tolist() == [[0.0, 10.0]]
    with pytest.raises(ArgumentError, match="4 candidates of 3 codewords"):
        candidates(torch.zeros(1, 2), BOOK, 4)
    with pytest.raises(ArgumentError, match="whole vectors"):
        candidates(torch.zeros(1, 3), torch.zeros(4, 2), 2)


def test_the_loss_of_ratios_by_hand() -> None:
    ratios = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    assert float(ratio_loss(ratios)) == pytest.approx((0.5 + 0.5) / 2)
    assert float(ratio_loss(ratios, as_coded=True)) == pytest.approx(2 * (0.1875 * 2) / 4)
    for as_coded in (False, True):
        assert float(ratio_loss(torch.eye(3), as_coded=as_coded)) == 0.0
        assert float(ratio_loss(torch.zeros(0, 2), as_coded=as_coded)) == 0.0


def test_freezing_is_for_good() -> None:
    state = candidates(torch.tensor([[0.25, 2.5, 1.4, 0.6]]), BOOK, 2)
    state.logits = torch.tensor([[0.0, 5.0], [4.0, 0.0], [0.0, 0.0], [6.0, 0.0]])  # .9933 .982 .5 .9975
    assert freeze(state, 0.99) == 0.5
    assert state.frozen.tolist() == [True, False, False, True]
    assert state.logits.tolist() == [[0, FROZEN_LOGIT], [4, 0], [0, 0], [FROZEN_LOGIT, 0]]
    assert freeze(state, 0.97) == 0.75
    hard = harden(state)
    assert hard.codes[:, 0].tolist() == [1, 2, 1, 1]
    assert hard.weight().tolist() == [[1.0, 3.0, 1.0, 1.0]]


def test_frozen_ratios_do_not_learn_and_the_state_given_stays() -> None:
    state = candidates(torch.tensor([[0.4, 2.0, 0.6, 0.45]]), BOOK, 2)
    state.logits[0] = torch.tensor([0.0, 9.0])
    freeze(state)
    kept, book = state.logits.clone(), state.codebook.clone()
    made = train(state, lambda w: (w - 0.4).square().sum(), 3, ratio_weight=0.0, enough=1.0)
    assert made.hard
    assert int(made.codes[0]) == 1, "the farther one, as it was frozen"
    assert torch.equal(state.logits, kept)
    assert torch.equal(state.codebook, book)
    assert not torch.equal(made.codebook, book)


def test_the_loss_picks_the_code_that_is_not_the_nearest() -> None:
    state = candidates(torch.tensor([[0.45, 0.4]]), BOOK, 2)
    made = train(state, lambda w: (w - 1.0).square().sum(), 200, codebook_rate=0.0)
    assert made.weight().tolist() == [[1.0, 1.0]]
    assert bool(made.frozen.all())


def test_the_loss_of_ratios_counts_on_steps_where_it_did_not_fall() -> None:
    seen: list[Tensor] = []

    def loss(weight: Tensor) -> Tensor:
        seen.append(weight.detach().clone())
        return 0.0 * weight.sum()

    train(candidates(torch.tensor([[0.4, 2.2]]), BOOK, 2), loss, 4, codebook_rate=0.0)
    same = [torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert same == [True, False, True], "nothing to compare with; not fallen; fallen"


def layer() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator) * torch.arange(1, 65) ** -0.5
    x = torch.randn(512, 64, generator=generator) @ mix.T
    return torch.randn(96, 64, generator=generator), x.T @ x / 512


@pytest.mark.parametrize("as_coded", [False, True])
def test_two_candidates_beat_the_codebook_alone(as_coded: bool) -> None:
    weight, hessian = layer()
    free = data_free(weight, layer_codebook(weight, 64, 4))
    energy = ((weight @ hessian) * weight).sum()

    def loss(made: Tensor) -> Tensor:
        return (((weight - made) @ hessian) * (weight - made)).sum() / energy

    results = []
    for count in (1, 2):
        state = candidates(weight, free.codebook[0], count, free.row_scale)
        made = train(state, loss, 150, codebook_rate=1e-3, as_coded=as_coded)
        results.append(output_error(weight, encoded(made).dense(), hessian))
        assert encoded(made).codes.shape == (96, 1, 16)
        assert torch.allclose(encoded(made).dense(), made.weight(), atol=0.05)
    assert results[1] < 0.8 * results[0] < 0.8 * output_error(weight, free.dense(), hessian)
