"""Devices by name: what can be used, and one sentence about what cannot."""

from __future__ import annotations

import pytest
import torch

from dit_accel.devices import pick, put
from dit_accel.errors import ArgumentError


class Pipe:
    moved: torch.device | None = None

    def to(self, device: torch.device) -> Pipe:
        self.moved = device
        return self


def test_auto_is_the_first_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick().type == pick("auto").type == wanted
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: made.append(device))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(pick()) == "cuda:1" == str(made[0])


def test_a_pipeline_stays_on_the_cpu_and_moves_elsewhere() -> None:
    pipe = Pipe()
    assert put(pipe, pick("cpu")) is pipe and pipe.moved is None
    assert put(pipe, pick("meta")) is pipe and str(pipe.moved) == "meta"


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "cpu:x", "xla"])
def test_what_is_not_here_is_one_sentence(name: str) -> None:
    with pytest.raises(ArgumentError, match="cannot be used here") as error:
        pick(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value) and "give auto or cpu" in str(error.value)
