"""Engine: makes what visitors ask for, one request at a time, in one thread; tells every step while it is at work."""

from __future__ import annotations

import queue
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch

from dit_accel.calls import Caller, Made
from dit_accel.compare import caption_seen, way_of
from dit_accel.render.item import canonical
from dit_accel.render.stop import Stop
from dit_accel.session import Session
from dit_accel.studio.catalogue import Catalogue, Model
from dit_accel.studio.followed import ACCELERATED, PLAIN, PREPARING, WAITING, Follower, Progress, size_of
from dit_accel.studio.outcome import Outcome
from dit_accel.studio.wanted import Wanted
from dit_accel.studio.watch import check

T = TypeVar("T")
KEPT_BYTES = 256 << 20  # of pictures of plain runs, so that turning a knob costs the accelerated run alone


class Engine:
    """One pipeline call at a time, whoever asks; every call in the same thread, as torch's settings belong to threads.

    threads: of torch, `None` for its own choice.
    """

    def __init__(self, catalogue: Catalogue, threads: int | None = None):
        self.catalogue = catalogue
        settings: dict[str, Any] = {}
        if threads is not None:
            settings = {"initializer": torch.set_num_threads, "initargs": (threads,)}
        self._worker = ThreadPoolExecutor(1, "studio", **settings)
        self._looker = ThreadPoolExecutor(1, "studio-preview", **settings)
        self._kept: OrderedDict[str, Made] = OrderedDict()

    def close(self) -> None:
        """End the threads, once what they are at is done."""
        self._worker.shutdown()
        self._looker.shutdown()

    def follow(self, work: Callable[[Callable[[Any], None]], T]) -> Iterator[Any]:
        """Do `work(tell)` in the worker's thread, once it is free: gives what is told meanwhile, the result last.

        Of what is told faster than it is read, the newest alone is given. What `work` raises is raised here.
        """
        told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        future = self._worker.submit(work, told.put)
        future.add_done_callback(lambda done: told.put(None))
        while True:
            event = told.get()
            while not told.empty():
                event = told.get()
            if event is None:
                break
            yield event
        yield future.result()

    def load(self, name: str) -> Model:
        """A pipeline of the catalogue, loaded and warm; one that is not there yet waits for the run in progress."""
        return self.catalogue.loaded(name) or self._worker.submit(self.catalogue.load, name).result()

    def compare(self, wanted: Wanted, stop: Stop) -> Iterator[Progress | Outcome]:
        """Make one request plain and accelerated; a `Progress` at every step, an `Outcome` at the end.

        Raises Cancelled within a step of `stop`, and DitAccelError where the policy cannot act or fails.
        """
        yield Progress(WAITING)
        try:
            yield from self.follow(lambda tell: self._compare(wanted, stop, tell))
        finally:
            stop.ask()  # whoever looked at it may have gone

    # ------------------------------------------------------------------------------------------ in the worker's thread

    def _compare(self, wanted: Wanted, stop: Stop, tell: Callable[[Progress], None]) -> Outcome:
        check(stop)
        tell(Progress(PREPARING))
        model = self.catalogue.load(wanted.pipeline)
        caller, size = Caller(model.pipe, wanted.arguments), size_of(wanted.arguments)
        caller.check([wanted.prompt])
        session = Session(model.pipe, wanted.policy, strict=True, arguments=wanted.arguments)
        session.check()  # refused before any work, if the policy cannot act on this pipe
        follower = Follower(wanted, stop, tell, self._looker)
        plain, kept = self._plain(caller, follower, size)
        follower.plain = plain.frames[len(plain.frames) // 2]
        follower.listen(session)
        session.attach()
        try:
            if session.calibration.kind is not None:  # its first run only measures
                follower.make(caller, PREPARING, size)
            made = follower.make(caller, ACCELERATED, size)
            return self._outcome(model, follower, session, plain, kept, made)
        finally:
            session.remove()

    def _plain(self, caller: Caller, follower: Follower, size: tuple[int, int] | None) -> tuple[Made, bool]:
        """The plain run, and whether it was there already."""
        wanted = follower.wanted
        key = canonical([wanted.pipeline, wanted.row])
        kept = key in self._kept
        if not kept:
            self._kept[key] = follower.make(caller, PLAIN, size)
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(made.pictures.nbytes for made in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return self._kept[key], kept

    def _outcome(
        self, model: Model, follower: Follower, session: Session, plain: Made, kept: bool, made: Made
    ) -> Outcome:
        wanted, stats = follower.wanted, session.stats
        run = max(stats.runs)
        totals, quantized = stats.runs[run], list(session.quantized.values())
        way = way_of(plain, made, wanted.steps, totals.flops_share, totals.compute_share, made.seconds)
        return Outcome(
            wanted=wanted,
            plain=plain,
            plain_kept=kept,
            made=made,
            way=replace(way, satisfied=caption_seen(model.classifier, wanted.prompt, made)),
            satisfied=caption_seen(model.classifier, wanted.prompt, plain),
            state_bytes=stats.state_bytes,
            records=tuple(follower.records),
            audits=tuple(audit for audit in stats.audits if audit.run == run),
            masks={layer: memory.mask.to_dense()[0].cpu() for layer, memory in follower.memories.items()},
            weight_errors={name: error for each in quantized for name, error in each.errors.items()},
            bits=quantized[0].bits_per_weight if quantized else None,
            times_smaller=quantized[0].ratio if quantized else None,
            report=session.report(),
        )
