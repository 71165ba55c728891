"""Matrix: every cell of mechanism x circumstance x pipeline, run to its one outcome."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import dit_accel
from dit_accel import DitAccelError, Session
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.composition import (
    adapters,
    compiled,
    control,
    formats,
    guidance,
    life,
    memory,
    schedules,
    sliced,
)
from dit_accel.testing.composition.circumstance import BLOCKS, Circumstance, Setting
from dit_accel.testing.composition.mechanisms import MECHANISMS, Mechanism

GROUPS: dict[str, tuple[Circumstance, ...]] = {
    "torch.compile": compiled.CIRCUMSTANCES,
    "offload and memory": memory.CIRCUMSTANCES,
    "feature slicing": sliced.CIRCUMSTANCES,
    "LoRA": adapters.CIRCUMSTANCES,
    "control and editing": control.CIRCUMSTANCES,
    "guidance": guidance.CIRCUMSTANCES,
    "schedulers": schedules.CIRCUMSTANCES,
    "dtypes and quantizers": formats.CIRCUMSTANCES,
    "life of the objects": life.CIRCUMSTANCES,
}
EQUAL, WITHIN, REFUSED = "equal", "within tolerance", "refused"


@dataclass(frozen=True)
class Cell:
    group: str
    circumstance: Circumstance
    mechanism: Mechanism
    pipeline: str

    @property
    def slow(self) -> bool:
        """The tests of every day look at the mechanisms all together, and at none."""
        return self.circumstance.slow or self.mechanism.name not in ("exact", "all")

    @property
    def name(self) -> str:
        return f"{self.group} / {self.circumstance.name} / {self.pipeline} / {self.mechanism.name}"


@dataclass(frozen=True)
class Outcome:
    """kind: one of three; distance: relative L2 to what is compared with; sentence: that refuses, or says what the
    tolerance is and why."""

    kind: str
    distance: float = 0.0
    sentence: str = ""


class Wrong(AssertionError):
    """A cell that keeps none of the three outcomes."""


def cells(*groups: str) -> Iterator[Cell]:
    """All cells, or those of some groups."""
    for group in groups or GROUPS:
        for circumstance in GROUPS[group]:
            for pipeline in circumstance.pipelines:
                for mechanism in MECHANISMS.values():
                    yield Cell(group, circumstance, mechanism, pipeline)


def run(cell: Cell) -> Outcome:
    """Bring the cell about and compare: two calls under the policy, one after `remove()`. Raises Wrong."""
    circumstance, mechanism = cell.circumstance, cell.mechanism
    if circumstance.impossible:
        return _impossible(cell)
    plain = plain_of(circumstance, cell.pipeline)
    with contextlib.ExitStack() as undo:
        setting = _setting(cell.pipeline, undo)
        expected = circumstance.refused.get(mechanism.name)
        try:
            first, again, session = _accelerated(setting, circumstance, mechanism)
        except (DitAccelError, ValueError) as error:  # diffusers refuses by ValueError
            if expected is None or expected not in str(error):
                raise
            return Outcome(REFUSED, sentence=str(error))
        if expected is not None:
            raise Wrong("was expected to be refused, and ran")
        if not mechanism.acted(session):
            raise Wrong(f"the mechanism did not act: {session.report()}")
        if not torch.equal(first, again):
            raise Wrong("the same call twice gives two results")
        session.remove()
        restored = distance(setting.call(), plain)
        if restored > circumstance.rounding:
            raise Wrong(f"after remove() the pipe differs from a plain one by {restored:.1e}")
    return _compare(cell, first, plain)


def _accelerated(setting: Setting, circumstance: Circumstance, mechanism: Mechanism) -> tuple[Tensor, Tensor, Session]:
    if not circumstance.after:
        circumstance.enter(setting)
    session = dit_accel.apply(setting.pipe, mechanism.policy)
    if circumstance.after:
        circumstance.enter(setting)
    return setting.call(), setting.call(), session


def _compare(cell: Cell, first: Tensor, plain: Tensor) -> Outcome:
    circumstance, mechanism = cell.circumstance, cell.mechanism
    compares_plain = circumstance.changes or (not mechanism.policy.acts_in_steps and mechanism.policy.weights is None)
    reference = plain if compares_plain else bare_of(mechanism.name, cell.pipeline)
    if torch.equal(first, reference):
        return Outcome(EQUAL)
    apart, allowed = distance(first, reference), circumstance.rounding
    sentence = f"{allowed:g} to the same policy without it: {circumstance.because}"
    if circumstance.changes:
        allowed = max(allowed, mechanism.tolerance)
        sentence = f"{allowed:g} to the plain pipe in it: what the mechanism itself costs on random weights"
    if not apart <= allowed:
        raise Wrong(f"differs by {apart:.3g}, and {allowed:g} is allowed")
    return Outcome(WITHIN, apart, sentence)


def _impossible(cell: Cell) -> Outcome:
    """The plain pipe fails in this circumstance, and says why; ours fails too."""
    said = []
    for policy in (None, cell.mechanism.policy):
        with contextlib.ExitStack() as undo:
            setting = _setting(cell.pipeline, undo)
            if policy is not None:
                dit_accel.apply(setting.pipe, policy)
            try:
                cell.circumstance.enter(setting)
                setting.call()
            except Exception as error:
                said.append(" ".join(str(error).split()))
    if len(said) != 2 or any(cell.circumstance.impossible not in sentence for sentence in said):
        raise Wrong(f"expected the plain pipe to fail as well: {said}")
    return Outcome(REFUSED, sentence=f"the plain pipe fails as well: {cell.circumstance.impossible}")


def _setting(pipeline: str, undo: contextlib.ExitStack) -> Setting:
    return Setting(tiny_pipelines.build(pipeline, blocks=BLOCKS), undo)


@functools.cache
def plain_of(circumstance: Circumstance, pipeline: str) -> Tensor:
    """What the plain pipe gives in the circumstance."""
    with contextlib.ExitStack() as undo:
        setting = _setting(pipeline, undo)
        circumstance.enter(setting)
        return setting.call()


@functools.cache
def bare_of(mechanism: str, pipeline: str) -> Tensor:
    """What the policy gives without the circumstance."""
    with contextlib.ExitStack() as undo:
        setting = _setting(pipeline, undo)
        dit_accel.apply(setting.pipe, MECHANISMS[mechanism].policy)
        return setting.call()


def distance(result: Tensor, reference: Tensor) -> float:
    """Relative L2."""
    return float((result - reference).norm() / reference.norm())
