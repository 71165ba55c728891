"""Batch: renders a visitor's list with the engine of `dit-accel render`, in the studio's one thread."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_accel.render.engine import execute, prepare
from dit_accel.render.ledger import DONE, Entry
from dit_accel.render.progress import Progress
from dit_accel.render.report import Report
from dit_accel.render.stop import Stop
from dit_accel.studio.catalogue import Model
from dit_accel.studio.engine import Engine
from dit_accel.studio.watch import Cancelled, check, watching

ARCHIVE = "pictures.zip"


@dataclass(frozen=True)
class BatchState:
    """Where a list stands. done, failed: items; pictures: finished files with their captions; report: at the end;
    archive: zip of all that is finished, at the end."""

    total: int
    done: int = 0
    failed: int = 0
    pictures: tuple[tuple[Path, str], ...] = ()
    errors: tuple[str, ...] = ()
    report: Report | None = None
    archive: Path | None = None
    cancelled: bool = False


class _Told(Progress):
    """Progress of a render that is told instead of printed."""

    def __init__(self, state: BatchState, out: Path, captions: dict[str, str], tell: Callable[[BatchState], None]):
        super().__init__(state.total, quiet=True)
        self.state, self.out, self.captions, self.tell = state, out, captions, tell

    def done(self, entry: Entry) -> None:
        super().done(entry)
        caption, state = self.captions[entry.id], self.state
        if entry.state == DONE:
            picture = (self.out / entry.file, caption)
            self.state = replace(state, done=state.done + 1, pictures=(*state.pictures, picture))
        else:
            self.state = replace(state, failed=state.failed + 1, errors=(*state.errors, f"{caption}: {entry.error}"))
        self.tell(self.state)


def render_list(
    engine: Engine, model: Model, rows: Sequence[dict[str, Any]], out: Path, stop: Stop
) -> Iterator[BatchState]:
    """Make all rows into files below `out`. A stop ends it within a step; what is finished stays.

    Raises ManifestError, PolicyError.
    """
    yield BatchState(len(rows))
    try:
        yield from engine.follow(lambda tell: _render(model, rows, out, stop, tell))
    finally:
        stop.ask()  # whoever looked at it may have gone


def _render(
    model: Model, rows: Sequence[dict[str, Any]], out: Path, stop: Stop, tell: Callable[[BatchState], None]
) -> BatchState:
    captions = {row["id"]: f"{row.get('prompt', '')} (seed {row['seed']})" for row in rows}
    told = _Told(BatchState(len(rows)), out, captions, tell)
    arguments = {name: value for name, value in model.defaults.items() if name != "class_labels"}
    request = replace(prepare(list(rows), model.folder, out, None, arguments=arguments), pipe=model.pipe)
    report, cancelled = None, False
    try:
        check(stop)
        with watching(model.pipe, stop):
            report = execute(
                request,
                workers=None,
                ray=None,
                overwrite=False,
                retry_failed=False,
                max_failures=None,
                contact_sheet=True,
                progress=told,
                stop=stop,
            )
        cancelled = stop.asked
    except Cancelled:
        cancelled = True
    return replace(told.state, report=report, cancelled=cancelled, archive=_archive(out, told.state))


def _archive(out: Path, state: BatchState) -> Path | None:
    """A zip of the finished files and what was said of each."""
    if not state.pictures:
        return None
    path = out / ARCHIVE
    with zipfile.ZipFile(path, "w") as archive:
        for picture, _ in state.pictures:
            for file in (picture, picture.with_suffix(".json")):
                archive.write(file, file.name)
    return path
