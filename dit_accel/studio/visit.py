"""Visit: what the studio remembers of one visitor, and of nobody else: the run in progress, and what was tried."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dit_accel.render.stop import Stop
from dit_accel.studio.outcome import Outcome

MOST_TRIES = 200


@dataclass(frozen=True)
class Try:
    """A point of the plot of quality against cost. number: of the visitor's runs, from 1; psnr: inf for identical
    pictures."""

    number: int
    pipeline: str
    label: str
    share: float
    psnr: float


@dataclass
class Visit:
    """State of one visitor. stop: of the run in progress; count: of runs; tries: newest last; outcome: the latest."""

    stop: Stop = field(default_factory=Stop)
    count: int = 0
    tries: list[Try] = field(default_factory=list)
    outcome: Outcome | None = None

    def __deepcopy__(self, memo: Any) -> Visit:
        """Gradio copies the initial state for each visitor; theirs is a new one."""
        del memo
        return Visit()

    def begin(self) -> Stop:
        """A new run of this visitor; one that is in progress is told to end."""
        self.stop.ask()
        self.stop = Stop()
        return self.stop

    def add(self, outcome: Outcome) -> None:
        """Remember what a run gave."""
        self.outcome, self.count = outcome, self.count + 1
        label = outcome.wanted.policy_name or "your own"
        way = outcome.way
        self.tries.append(Try(self.count, outcome.wanted.pipeline, label, way.flops_share, way.psnr))
        del self.tries[:-MOST_TRIES]
