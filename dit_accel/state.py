"""State: what changes while sampling. One `BranchState` per denoiser and guidance branch, dropped when its run ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_accel.cache.gate import GateState
from dit_accel.cache.step_control import StepControl
from dit_accel.denoiser.clock import Clock
from dit_accel.denoiser.contract import Contract
from dit_accel.forecast.corrector import Corrector


@dataclass(frozen=True)
class Anchor:
    """A computed step. coordinate: where on the forecast's axis; probe: residual of the probe blocks [B, S, D], `None`
    where whole steps are skipped; values: for each output of the tail, its residual (or absolute value) [B, S, D], or
    `None`, or else each output of the model; finite: [] flag."""

    coordinate: float
    probe: Tensor | None
    values: tuple[Tensor | None, ...]
    finite: Tensor


@dataclass
class BranchState:
    """What is remembered between the steps of one branch. rebuild: makes a model's result of its tensors."""

    key: Any = None
    anchors: list[Anchor] = field(default_factory=list)
    previous_probe: Tensor | None = None
    gate: GateState = GateState()
    seen: int = 0
    rebuild: Callable[[Sequence[Tensor]], Any] | None = None

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
            if anchor.probe is not None:
                yield anchor.probe
            yield from (value for value in anchor.values if value is not None)
        if self.previous_probe is not None and all(a.probe is not self.previous_probe for a in self.anchors):
            yield self.previous_probe


@dataclass(frozen=True)
class Decided:
    """How the denoiser calls of one step were served: kinds of decision, names of denoisers."""

    kinds: frozenset[str] = frozenset()
    denoisers: frozenset[str] = frozenset()


@dataclass
class RunState:
    """One sampling run: its number, its thread, its clock and the state of every branch.

    corrector: `None` where the policy has none; control: how far the next computed step may lie ahead; stepped: the
    denoisers of the last step.
    """

    number: int
    clock: Clock
    corrector: Corrector | None = None
    thread: int = field(default_factory=threading.get_ident)
    branches: dict[tuple[str, str], BranchState] = field(default_factory=dict)
    contracts: dict[tuple[str, Any], Contract] = field(default_factory=dict)
    stage: int = 0
    control: StepControl = StepControl()
    decided: Decided = Decided()
    stepped: frozenset[str] = frozenset()

    def decide(self, kind: str, denoiser: str) -> None:
        """Note how one denoiser call of the current step was served."""
        self.decided = Decided(self.decided.kinds | {kind}, self.decided.denoisers | {denoiser})

    def take_decided(self) -> Decided:
        """How the calls since the last step were served; the next step starts anew."""
        decided, self.decided = self.decided, Decided()
        return decided

    def branch(self, denoiser: str, name: str) -> BranchState:
        """The state of a branch; every branch starts anew with a new list of time steps (another stage, or segment)."""
        if self.stage != self.clock.stage:
            self.branches.clear()
            if self.corrector is not None:
                self.corrector.forget()
            self.control = StepControl()
            self.stage = self.clock.stage
        return self.branches.setdefault((denoiser, name), BranchState())

    def state_bytes(self) -> int:
        """Memory held by features of this run, in bytes."""
        held = [t for branch in self.branches.values() for t in branch.tensors()]
        held += self.corrector.tensors() if self.corrector is not None else []
        return sum(t.numel() * t.element_size() for t in held)
