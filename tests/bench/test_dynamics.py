"""Dynamics: forecasts of known curves, what the hooks see, and that trained weights come back."""

import pytest
import torch

from dit_accel.bench.dynamics import Recorder, forecast_error, random_weights, relative_l1, rounded
from dit_accel.denoiser.find import find_block_lists
from dit_accel.testing import tiny_pipelines


def test_forecast_is_exact_on_polynomials_of_its_order() -> None:
    steps = torch.arange(20.0).view(-1, 1)
    assert forecast_error(torch.ones(20, 3), 3, 0) == 0
    assert forecast_error(1 + steps, 3, 1) == pytest.approx(0, abs=1e-6)
    assert forecast_error(1 + steps, 3, 0) > 0.05
    assert forecast_error(1 + steps**2, 5, 2) == pytest.approx(0, abs=1e-5)
    assert forecast_error(1 + steps**2, 5, 1) > 0.05


def test_forecast_error_worked_out_by_hand() -> None:
    """Every 2nd of 0, 1, 4, 9, 16, 25: step 5 from the anchors 2 and 4 gives 22 instead of 25."""
    # Judged are steps after the third anchor, 4, so that every order has what it needs: 5 alone.
    assert forecast_error(torch.tensor([[0.0], [1], [4], [9], [16], [25]]), 2, 1) == pytest.approx((25 - 22) / 25)


@pytest.mark.parametrize("name", ["flux", "wan", "sd3", "dit"])
def test_recorder_sees_every_block_of_every_call(name: str) -> None:
    tiny = tiny_pipelines.build(name)
    blocks = sum(map(len, find_block_lists(tiny.pipe.transformer).values()))
    recorder = Recorder(tiny.pipe.transformer)
    tiny_pipelines.call(tiny, steps=4)
    recorder.remove()
    traces = recorder.traces(4)
    assert traces and all(trace.change.shape == (3, blocks) for trace in traces)
    assert all(float(trace.change.min()) > 0 for trace in traces), "random blocks change at every step"
    calls = len(recorder.calls)
    tiny_pipelines.call(tiny, steps=4)
    assert len(recorder.calls) == calls, "hooks are gone after remove"


def test_stack_residual_is_what_the_blocks_add() -> None:
    tiny = tiny_pipelines.build("wan")
    transformer = tiny.pipe.transformer
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        seen.setdefault(name, value.clone())

    first, last = transformer.blocks[0], transformer.blocks[-1]
    handles = [
        first.register_forward_pre_hook(lambda _, x: keep("in", x[0])),
        last.register_forward_hook(lambda _, __, y: keep("out", y)),
    ]
    recorder = Recorder(transformer)
    tiny_pipelines.call(tiny, steps=2)
    recorder.remove()
    for handle in handles:
        handle.remove()
    assert relative_l1(recorder.traces(2)[0].stack[0], seen["out"] - seen["in"]) == 0


def test_random_weights_leave_the_trained_ones_as_they_were() -> None:
    tiny = tiny_pipelines.build("flux")
    before = {name: value.clone() for name, value in tiny.pipe.transformer.state_dict().items()}
    with random_weights(tiny.pipe, seed=5):
        during = tiny.pipe.transformer.state_dict()
        assert any(not torch.equal(before[name], during[name]) for name in before)
        assert all(bool(p.any()) for p in tiny.pipe.transformer.parameters()), "no layer at zero"
    after = tiny.pipe.transformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rounding_keeps_the_shape() -> None:
    assert rounded({"a": [1.23456789, 2], "b": "x"}) == {"a": [1.2346, 2], "b": "x"}
