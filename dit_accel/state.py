"""State: what changes while sampling. One `BranchState` per denoiser and guidance branch, dropped when its run ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_accel.cache.gate import GateState
from dit_accel.denoiser.clock import Clock
from dit_accel.denoiser.contract import Contract


@dataclass(frozen=True)
class Anchor:
    """A computed step. coordinate: where on the forecast's axis; probe: residual of the probe blocks [B, S, D];
    values: for each output of the tail, its residual (or absolute value) [B, S, D], or `None`; finite: [] flag."""

    coordinate: float
    probe: Tensor
    values: tuple[Tensor | None, ...]
    finite: Tensor


@dataclass
class BranchState:
    """What is remembered between the steps of one branch."""

    key: Any = None
    anchors: list[Anchor] = field(default_factory=list)
    previous_probe: Tensor | None = None
    gate: GateState = GateState()
    seen: int = 0

    def remember(self, anchor: Anchor, most: int) -> None:
        """Add an anchor, oldest out; it replaces an earlier one at the same coordinate (solvers repeat sigmas)."""
        others = [other for other in self.anchors if abs(other.coordinate - anchor.coordinate) >= 1e-9]
        self.anchors = [*others, anchor][-most:]

    def drop(self) -> None:
        """Forget every feature; the count of steps seen stays."""
        self.anchors.clear()
        self.previous_probe = None
        self.gate = GateState()

    def tensors(self) -> Iterator[Tensor]:
        for anchor in self.anchors:
            yield anchor.probe
            yield from (value for value in anchor.values if value is not None)
        if self.previous_probe is not None and all(a.probe is not self.previous_probe for a in self.anchors):
            yield self.previous_probe


@dataclass
class RunState:
    """One sampling run: its number, its thread, its clock and the state of every branch."""

    number: int
    clock: Clock
    thread: int = field(default_factory=threading.get_ident)
    branches: dict[tuple[str, str], BranchState] = field(default_factory=dict)
    contracts: dict[tuple[str, Any], Contract] = field(default_factory=dict)
    stage: int = 0

    def branch(self, denoiser: str, name: str) -> BranchState:
        """The state of a branch; every branch starts anew with a new list of time steps (another stage, or segment)."""
        if self.stage != self.clock.stage:
            self.branches.clear()
            self.stage = self.clock.stage
        return self.branches.setdefault((denoiser, name), BranchState())

    def state_bytes(self) -> int:
        """Memory held by features of this run, in bytes."""
        return sum(t.numel() * t.element_size() for b in self.branches.values() for t in b.tensors())
