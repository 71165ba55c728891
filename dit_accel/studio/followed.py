"""Followed: one run of a pipeline, plain or accelerated, that tells its steps and can be cancelled within one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dit_accel.attention.route import AttentionEvent
from dit_accel.attention.search import Memory
from dit_accel.calls import Caller, Made
from dit_accel.render.stop import Stop
from dit_accel.session import Session
from dit_accel.stats import StepRecord
from dit_accel.studio.preview import Preview
from dit_accel.studio.wanted import Wanted
from dit_accel.studio.watch import check, watching

WAITING, PREPARING, PLAIN, ACCELERATED = "waiting", "preparing", "plain", "accelerated"


@dataclass(frozen=True)
class Progress:
    """Where a request stands. phase: waiting, preparing, plain or accelerated; step: in progress, from 1; preview:
    unfinished picture [3, H, W] or `None`; plain: the same of the finished plain run; records: of the accelerated run
    so far."""

    phase: str
    step: int = 0
    total: int = 0
    preview: Tensor | None = None
    plain: Tensor | None = None
    records: Sequence[StepRecord] = ()


class Follower:
    """Follows the runs of one request. tell: takes each `Progress`; looker: a thread of its own, which decodes previews
    while the run waits: counters of the run's FLOPs see the run's thread alone."""

    def __init__(self, wanted: Wanted, stop: Stop, tell: Callable[[Progress], None], looker: Executor):
        self.wanted, self.stop, self.tell, self.looker = wanted, stop, tell, looker
        self.records: list[StepRecord] = []
        self.memories: dict[str, Memory] = {}  # attention layer -> the blocks kept by its last sparse call
        self.plain: Tensor | None = None
        self._phase, self._preview = PREPARING, None

    def make(self, caller: Caller, phase: str, size: tuple[int, int] | None) -> Made:
        """One run of the pipe as it stands; its seconds are without those of following it.

        size: height and width of what it makes, in pixels. Raises Cancelled.
        """
        preview = Preview(caller.pipe, size)
        self._phase, self._preview = phase, None
        self.records, self.memories = [], {}
        self._told(0)

        def at_step(step: int, latents: Tensor | None) -> None:
            picture = self.looker.submit(preview, latents).result()
            self._preview = self._preview if picture is None else picture
            self._told(step + 1)

        with watching(caller.pipe, self.stop, at_step) as watch:
            made = caller.make(self.wanted.prompt, self.wanted.seed, self.wanted.steps)
        return replace(made, seconds=made.seconds - watch.seconds)

    def listen(self, session: Session) -> None:
        """Also hear what a session does: steps that call no denoiser, and which blocks its attention keeps."""
        session.on_step(self._heard)
        if session.policy.is_sparse:
            session.on_attention(self._attended)

    def _heard(self, record: StepRecord) -> None:
        check(self.stop)
        self.records.append(record)
        self._told(record.step + 1)

    def _attended(self, event: AttentionEvent) -> None:
        if event.memory is not None:
            self.memories[event.layer] = event.memory

    def _told(self, step: int) -> None:
        total = self.wanted.steps
        self.tell(Progress(self._phase, min(step, total), total, self._preview, self.plain, tuple(self.records)))


def size_of(arguments: Any) -> tuple[int, int] | None:
    """Height and width that a call asks for."""
    return (arguments["height"], arguments["width"]) if "height" in arguments else None
