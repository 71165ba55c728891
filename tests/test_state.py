"""What is remembered between steps, and when it is forgotten."""

from __future__ import annotations

import pytest
import torch

from dit_accel.cache.gate import GateState
from dit_accel.denoiser.clock import Clock
from dit_accel.state import MODEL, Anchor, BranchState, RunState


def anchor(coordinate: float, value: torch.Tensor | None = None) -> Anchor:
    value = torch.full((2, 3), coordinate) if value is None else value
    return Anchor(coordinate, (value, None), torch.zeros(()))


@pytest.mark.parametrize(
    ("most", "kept"), [(1, [5.0]), (2, [4.0, 5.0]), (3, [2.0, 4.0, 5.0]), (9, [1.0, 2.0, 4.0, 5.0])]
)
def test_the_newest_anchors_stay_oldest_first(most: int, kept: list[float]) -> None:
    state = BranchState()
    for coordinate in (1.0, 2.0, 4.0, 5.0):
        state.remember(MODEL, anchor(coordinate), most)
    assert [a.coordinate for a in state.units[MODEL]] == kept


@pytest.mark.parametrize(
    ("coordinates", "kept"),
    [
        ([1.0, 0.8, 0.8], [1.0, 0.8]),  # Heun
        ([0.9, 0.8, 0.9], [0.8, 0.9]),  # a sampler that goes back and does a part of the way again
        ([0.9, 0.8, 0.9, 0.8], [0.9, 0.8]),
        ([1.0, 1.0 + 1e-12], [1.0 + 1e-12]),
    ],
)
def test_no_two_anchors_share_a_coordinate(coordinates: list[float], kept: list[float]) -> None:
    """Divided differences would divide by zero."""
    state = BranchState()
    for number, coordinate in enumerate(coordinates):
        state.remember(MODEL, anchor(coordinate, torch.tensor([float(number)])), 3)
    assert [a.coordinate for a in state.units[MODEL]] == kept
    value = state.units[MODEL][-1].values[0]
    assert value is not None and value.item() == len(coordinates) - 1


def test_drop_forgets_features_and_keeps_the_count() -> None:
    state = BranchState(key="key", previous=(torch.zeros(2),), gate=GateState(0.5, 2), seen=7)
    state.remember(MODEL, anchor(1.0), 2)
    state.drop()
    assert list(state.tensors()) == []
    assert (state.gate, state.seen, state.key) == (GateState(), 7, "key")


def test_bytes_are_counted_once() -> None:
    run = RunState(0, Clock())
    state = run.branch("transformer", "cond")
    state.remember(MODEL, anchor(1.0), 2)
    assert run.state_bytes() == 4 * 6
    probe = torch.zeros(5)
    state.remember_signal(1.0, (probe,), 2)
    state.previous = (probe,)
    assert run.state_bytes() == 4 * (6 + 5)
    state.previous = (torch.zeros(10, dtype=torch.bfloat16),)
    assert run.state_bytes() == 4 * (6 + 5) + 2 * 10


def test_every_branch_has_a_state_of_its_own() -> None:
    run = RunState(0, Clock())
    states = [run.branch(*key) for key in (("a", "cond"), ("a", "uncond"), ("b", "cond"))]
    assert len({id(state) for state in states}) == 3
    assert run.branch("a", "cond") is states[0]


def test_another_stage_starts_with_fresh_branches() -> None:
    """Features of the last step of one segment say nothing about the pure noise of the next."""
    run = RunState(0, Clock())
    before = run.branch("transformer", "cond")
    assert run.branch("transformer", "cond") is before
    run.clock.stage += 1
    assert run.branch("transformer", "cond") is not before
    assert run.branch("transformer", "cond") is run.branch("transformer", "cond")
