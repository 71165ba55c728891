"""Studio: what the parts of the page share: the engine, the one output folder and the limits; nothing of a visitor."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.studio.catalogue import Catalogue, Model
from dit_accel.studio.engine import Engine
from dit_accel.studio.followed import Progress
from dit_accel.studio.limits import Limits, choice
from dit_accel.studio.outcome import Outcome
from dit_accel.studio.output import Files, Output
from dit_accel.studio.visit import Visit
from dit_accel.studio.wanted import wanted

UNEXPECTED = "This was not expected; the log of the server says more. The next run is not affected."
_log = logging.getLogger(__name__)


class Studio:
    """folders: of pipelines; out: output folder; threads: of torch. Use `close` at the end."""

    def __init__(self, folders: Sequence[Path], out: Path, limits: Limits | None = None, threads: int | None = None):
        self.limits = limits or Limits()
        self.engine = Engine(Catalogue(folders), threads)
        self.output = Output(out)

    @property
    def names(self) -> list[str]:
        return self.engine.catalogue.names

    def close(self) -> None:
        self.engine.close()

    def model(self, name: Any) -> Model:
        """A pipeline by the name that somebody gave. Raises ArgumentError."""
        return self.engine.load(choice("pipeline", name, self.names))

    def compare(self, visit: Visit, pipeline: Any, **asked: Any) -> Iterator[Progress | tuple[Outcome, Files, Model]]:
        """Check a request, make it, write its files and remember it. asked: as of `wanted`.

        Raises DitAccelError, Cancelled.
        """
        stop = visit.stop
        model = self.model(pipeline)
        checked = wanted(model, self.limits, **asked)
        for event in self.engine.compare(checked, stop):
            if isinstance(event, Progress):
                yield event
                continue
            visit.add(event)
            yield event, self.output.save(event, model), model


def sentence_of(error: Exception) -> str:
    """What the visitor is told of a failure; what was not expected goes to the log alone."""
    if isinstance(error, DitAccelError):
        return str(error)
    _log.error("A request failed.", exc_info=error)
    return UNEXPECTED
