"""Whole: results of every kind come back with other tensors in the same places."""

from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from dit_accel.denoiser.whole import rebuilder, tensors_in

A, B = torch.zeros(2), torch.ones(3)


@pytest.mark.parametrize(
    ("result", "count"),
    [
        (A, 1),
        ((A,), 1),
        ((A, None, B), 2),
        ([A, "text"], 1),
        (([A, B], None), 2),
        (Transformer2DModelOutput(A), 1),
    ],
)
def test_tensors_are_exchanged_and_the_rest_stays(result: Any, count: int) -> None:
    tensors = tensors_in(result)
    assert len(tensors) == count
    again = rebuilder(result)([tensor + 5 for tensor in tensors])
    assert type(again) is type(result)
    assert [t.tolist() for t in tensors_in(again)] == [(t + 5).tolist() for t in tensors]
    if isinstance(result, (tuple, list)):
        assert [type(value) for value in again] == [type(value) for value in result]
    elif not isinstance(result, Tensor):
        assert torch.equal(again.sample, A + 5)
