"""Circumstance: what users do with a pipeline; a cell is one of these beside one mechanism, on one pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_accel.testing import tiny_pipelines
from dit_accel.testing.tiny_pipelines import TinyPipeline

STEPS, BLOCKS = 6, 4
Enter = Callable[["Setting"], None]


@dataclass
class Setting:
    """A pipeline with what a circumstance changes about it. undo: takes back what would outlive the pipeline."""

    tiny: TinyPipeline
    undo: contextlib.ExitStack
    arguments: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS

    @property
    def pipe(self) -> Any:
        return self.tiny.pipe

    @property
    def denoisers(self) -> list[Any]:
        return [getattr(self.pipe, name) for name in self.tiny.denoisers]

    def call(self) -> Tensor:
        return tiny_pipelines.call(self.tiny, self.steps, **self.arguments)


@dataclass(frozen=True, eq=False)  # told by identity, so that results can be kept by it
class Circumstance:
    """enter: brings it about. after: this happens after `apply`, else before. changes: what the pipe gives is changed,
    so that results are compared with the plain pipe in the circumstance; else with the same policy without it.
    rounding, because: relative L2 by which it may differ, where the same numbers are computed in another order.
    refused: mechanism -> part of the sentence that refuses it. impossible: part of what diffusers, torch or
    `slice_features` say, where the plain pipe fails as well. needs: a package. slow: needs minutes.
    """

    name: str
    enter: Enter
    pipelines: tuple[str, ...] = ("flux",)
    after: bool = False
    changes: bool = False
    rounding: float = 0.0
    because: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    impossible: str = ""
    needs: str = ""
    slow: bool = False


def both_ways(name: str, enter: Enter, **more: Any) -> tuple[Circumstance, Circumstance]:
    """The circumstance before `apply` and after it."""
    return (
        Circumstance(f"{name}, then apply", enter, **more),
        Circumstance(f"apply, then {name}", enter, after=True, **more),
    )
