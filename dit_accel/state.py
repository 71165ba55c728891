"""State: what changes while sampling. One `BranchState` per denoiser and guidance branch, dropped when its run ends."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.search import Memory
from dit_accel.cache.gate import GateState, Verdict
from dit_accel.cache.indicator import mean_absolute, relative_l1
from dit_accel.cache.methods.easycache import transformation_rate
from dit_accel.cache.step_control import StepControl
from dit_accel.denoiser.clock import Clock
from dit_accel.denoiser.contract import Contract
from dit_accel.forecast.confidence import Confidence
from dit_accel.forecast.corrector import Corrector
from dit_accel.forecast.predictors import Kind
from dit_accel.forecast.weights import differ

Unit = Hashable
"""What is remembered by itself: MODEL, a range of places in the stack, or (place, name) of a layer in a block."""
MODEL, VERIFIED = "model", "verified"


@dataclass(frozen=True)
class Anchor:
    """A computed step of one unit. coordinate: where on the forecast's axis; values: for each output of the unit, its
    residual or absolute value [B, S, D], or `None`; finite: [] flag; kinds: dtype and device that the values had before
    they were put away, empty where they are kept as they were."""

    coordinate: float
    values: tuple[Tensor | None, ...]
    finite: Tensor
    kinds: tuple[Kind | None, ...] = ()

    def put_away(self, storage: str) -> Anchor:
        """The same, kept in half the memory or in that of the CPU."""
        if storage == "same":
            return self
        kinds = tuple(None if value is None else (value.dtype, value.device) for value in self.values)
        stored = tuple(None if value is None else _stored(value, storage) for value in self.values)
        return Anchor(self.coordinate, stored, self.finite, kinds)


@dataclass
class BranchState:
    """What is remembered between the steps of one branch.

    units: anchors of each unit, oldest first; signals: the signal at the last computed steps, with its coordinate;
    previous: the signal at the step before; change: indicator measured while computing, for the next step; rate,
    seen_io: EasyCache's; ratios: MagCache's table; similarities, ranked_at, odd: Sortblock's; confidence: what
    forecasts and reuse of each unit have missed; rebuild: makes a model's result of its tensors, and is_residual
    whether its first is kept as a residual to the input; builders: the same for layers.
    """

    key: Any = None
    units: dict[Unit, list[Anchor]] = field(default_factory=dict)
    signals: list[tuple[float, tuple[Tensor, ...]]] = field(default_factory=list)
    previous: tuple[Tensor, ...] | None = None
    gate: GateState = GateState()
    seen: int = 0
    change: Tensor | None = None
    rate: Tensor | None = None
    seen_io: tuple[Tensor, Tensor] | None = None
    side: list[Tensor] = field(default_factory=list)
    ratios: Sequence[float] = ()
    similarities: dict[Unit, Tensor] = field(default_factory=dict)
    ranked_at: float = 0.0
    odd: frozenset[Unit] = frozenset()
    rebuild: Callable[[Sequence[Tensor]], Any] | None = None
    is_residual: bool = False
    builders: dict[Unit, Callable[[Sequence[Tensor]], Any]] = field(default_factory=dict)
    confidence: dict[Unit, Confidence] = field(default_factory=dict)

    def remember(self, unit: Unit, anchor: Anchor, most: int) -> None:
        """Add an anchor, oldest out; it replaces an earlier one at the same coordinate (solvers repeat sigmas)."""
        others = [other for other in self.units.get(unit, ()) if differ(other.coordinate, anchor.coordinate)]
        self.units[unit] = [*others, anchor][-most:]

    def remember_signal(self, coordinate: float, signal: tuple[Tensor, ...], most: int) -> None:
        """The same for the signal."""
        others = [other for other in self.signals if differ(other[0], coordinate)]
        self.signals = [*others, (coordinate, signal)][-most:]

    def note_rate(self, latent: Tensor, output: Tensor) -> None:
        """EasyCache: after a computed step, how fast the output changes with the input, over the output's size."""
        if self.seen_io is not None and self.seen_io[1].shape == output.shape:
            rate = transformation_rate(output, self.seen_io[1], latent, self.seen_io[0])
            self.rate = rate / mean_absolute(output)
        self.seen_io = (latent.clone(), output.clone())

    def moving(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of several tensors the one that has changed most since the last call: text stays, time moves."""
        earlier, self.side = self.side, [tensor.clone() for tensor in tensors]
        if not tensors or len(earlier) != len(tensors):
            return tensors[:1]
        changes = [relative_l1(now, before).nan_to_num(0.0) for now, before in zip(tensors, earlier)]
        return (self.side[int(torch.stack(changes).argmax())],)

    def drop(self) -> None:
        """Forget every feature; the count of steps seen stays."""
        ratios, seen, key = self.ratios, self.seen, self.key
        self.__init__()
        self.ratios, self.seen, self.key = ratios, seen, key

    def tensors(self) -> Iterator[Tensor]:
        """Every feature that is held, each once."""
        held = [value for anchors in self.units.values() for anchor in anchors for value in anchor.values]
        held += [tensor for _, tensors in self.signals for tensor in tensors]
        held += [*(self.previous or ()), *(self.seen_io or ()), *self.side]
        yield from {id(tensor): tensor for tensor in held if tensor is not None}.values()


def _stored(value: Tensor, storage: str) -> Tensor:
    if storage == "host":
        return value.to("cpu")
    return value.to(torch.bfloat16) if value.dtype in (torch.float32, torch.float64) else value


@dataclass(frozen=True)
class Decided:
    """How the denoiser calls of one step were served: kinds of decision, names of denoisers."""

    kinds: frozenset[str] = frozenset()
    denoisers: frozenset[str] = frozenset()


@dataclass
class Lane:
    """What belongs to one sample of the batch (or to all, where they are not told apart).

    corrector: `None` where the policy has none; control: how far the next computed step may lie ahead; decided: how the
    calls of this step were served; stepped: the denoisers of the last step; scheduler: attributes that the scheduler
    has on this sample's path, `None` where all samples share one.
    """

    corrector: Corrector | None = None
    control: StepControl = StepControl()
    decided: Decided = Decided()
    stepped: frozenset[str] = frozenset()
    scheduler: dict[str, Any] | None = None

    def decide(self, kind: str, denoiser: str) -> None:
        """Note how one denoiser call of the current step was served."""
        self.decided = Decided(self.decided.kinds | {kind}, self.decided.denoisers | {denoiser})

    def take_decided(self) -> Decided:
        """How the calls since the last step were served; the next step starts anew."""
        decided, self.decided = self.decided, Decided()
        return decided

    def restart(self) -> None:
        """Another list of time steps begins."""
        if self.corrector is not None:
            self.corrector.forget()
        self.control = StepControl()


@dataclass
class RunState:
    """One sampling run: its number, its thread, its clock and the state of every branch.

    lanes: one a sample, or one for all; samples: in the batch, `None` while not known; joint: why they are not told
    apart, if they are not; reuses: nothing is forecast, since the scheduler adds noise; leads: what the first branch of
    a denoiser decided, and at which step; outputs: of the first branch and its step, where others are told by their
    difference; calls: arguments of the first call of each denoiser, until the samples are known; adapters: that act in
    each denoiser; kept_blocks: what attention calls found, for later steps; grids: of their tokens.
    """

    number: int
    clock: Clock
    lanes: list[Lane] = field(default_factory=lambda: [Lane()])
    thread: int = field(default_factory=threading.get_ident)
    branches: dict[tuple[str, str], BranchState] = field(default_factory=dict)
    contracts: dict[tuple[str, Any], Contract] = field(default_factory=dict)
    stage: int = 0
    samples: int | None = None
    joint: str | None = None
    reuses: bool = False
    leads: dict[tuple[str, int], tuple[int, str, Verdict]] = field(default_factory=dict)
    kept_blocks: dict[Any, Memory] = field(default_factory=dict)
    grids: dict[Any, TokenGrid | None] = field(default_factory=dict)
    outputs: dict[tuple[str, int], tuple[int, list[Any]]] = field(default_factory=dict)
    calls: dict[str, Callable[[int], str | None]] = field(default_factory=dict)
    adapters: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def split(self, samples: int) -> None:
        """The number of samples is known: give each a lane, unless a denoiser's calls do not let them be told apart."""
        self.samples = samples
        reasons = [reason for why in self.calls.values() if (reason := why(samples)) is not None]
        self.calls.clear()
        self.joint = next(iter(reasons), None)
        if samples > 1 and self.joint is None:
            first = self.lanes[0]
            self.lanes = [first, *(copy.deepcopy(first) for _ in range(samples - 1))]

    def branch(self, denoiser: str, name: str) -> BranchState:
        """The state of a branch; every branch starts anew with a new list of time steps (another stage, or segment)."""
        if self.stage != self.clock.stage:
            self.branches.clear()
            self.kept_blocks.clear()
            for lane in self.lanes:
                lane.restart()
            self.stage = self.clock.stage
        return self.branches.setdefault((denoiser, name), BranchState())

    def forget(self, denoiser: str) -> None:
        """Drop every feature of a denoiser, which has become another."""
        for (name, _), state in self.branches.items():
            if name == denoiser:
                state.drop()
        for lane in self.lanes:
            lane.restart()

    def state_bytes(self) -> int:
        """Memory held by features of this run, in bytes."""
        held = [t for branch in self.branches.values() for t in branch.tensors()]
        held += [t for lane in self.lanes if lane.corrector is not None for t in lane.corrector.tensors()]
        kept = sum(memory.nbytes for memory in self.kept_blocks.values())
        return kept + sum(t.numel() * t.element_size() for t in held)
