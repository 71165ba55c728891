"""Engine: renders a manifest into a folder, from its check to its report; loses nothing and makes nothing twice."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.policy import Policy, as_policy
from dit_accel.render.fields import checked, refuse_unknown
from dit_accel.render.grouping import batches_of
from dit_accel.render.item import Item
from dit_accel.render.ledger import DONE, FAILED, FORGOTTEN, Entry, History, Ledger
from dit_accel.render.lock import FolderLock, wait_for_workers
from dit_accel.render.manifest import items_of, load_manifest
from dit_accel.render.plan import Plan, identity_of, make_plan, of_shard, resolve
from dit_accel.render.progress import Progress
from dit_accel.render.report import Report
from dit_accel.render.settings import Job, RenderSettings
from dit_accel.render.signature import Signature, signature_of
from dit_accel.render.stop import Stop
from dit_accel.render.storage import OURS, ours

SHEET = "contact-sheet.html"


@dataclass(frozen=True)
class Request:
    """What to render: the manifest's items with all settings in force, and how.

    settings: shared by all items; items: of this part; every: of all parts; shard: (number, of how many); ending: of
    files, where it is known before the pipeline is loaded; pipe: a loaded pipeline.
    """

    settings: RenderSettings
    items: tuple[Item, ...] = field(repr=False)
    every: tuple[Item, ...] = field(repr=False)
    shard: tuple[int, int] = (0, 1)
    ending: str | None = None
    pipe: Any = None

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    @property
    def worker(self) -> str:
        """Name of the ledger of this process."""
        number, count = self.shard
        return "main" if count == 1 else f"part-{number}-of-{count}"

    def plan(self, history: History, overwrite: bool = False, retry_failed: bool = False) -> Plan:
        """What is still to be made."""
        return make_plan(
            self.items,
            history,
            self.out,
            overwrite=overwrite,
            retry_failed=retry_failed,
            run=history.runs + 1,
            ending=self.ending,
        )


def prepare(
    jobs: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    pipeline: Any,
    out: str | os.PathLike[str],
    policy: Policy | str | Mapping[str, Any] | None = "balanced",
    *,
    arguments: Mapping[str, Any] | None = None,
    base_seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    **settings: Any,
) -> Request:
    """Check everything that can be checked without loading the pipeline; arguments as of `render`.

    Raises ManifestError, PolicyError.
    """
    loaded = None if isinstance(pipeline, (str, os.PathLike)) else pipeline
    if isinstance(jobs, (str, os.PathLike)):
        items = load_manifest(jobs, base_seed)
    else:
        items = items_of(((f"item {number}", dict(row)) for number, row in enumerate(jobs, 1)), "jobs", base_seed)
    if loaded is None:
        name, signature, identity = os.fspath(pipeline), signature_of(pipeline), identity_of(pipeline)
    else:
        name = identity = type(loaded).__name__
        signature = Signature(name, None)
    shared = RenderSettings(name, os.path.abspath(out), **settings)
    given = policy.to_dict() if isinstance(policy, Policy) else policy
    if given is not None:
        as_policy(given)  # so that what is wrong with it is not told of the first item
    common = shared.common | {"pipeline": identity}
    defaults = checked(arguments or {}, "arguments of all items")
    if signature.names is not None:
        refuse_unknown(defaults, signature.names, name, "arguments of all items")
    every = resolve(items, given, defaults, common, signature)
    known = (".mp4" if signature.makes_video else ".png") if signature.names is not None else None
    return Request(shared, of_shard(every, shard) if shard[1] > 1 else every, every, shard, known, loaded)


def render(
    jobs: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    pipeline: Any,
    out: str | os.PathLike[str],
    policy: Policy | str | Mapping[str, Any] | None = "balanced",
    *,
    workers: int | None = None,
    ray: str | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    max_failures: int | None = None,
    contact_sheet: bool = True,
    progress: Progress | None = None,
    stop: Stop | None = None,
    **settings: Any,
) -> Report:
    """Make every item of a manifest that is not made yet, and say what there is now.

    jobs: a .jsonl, .csv or .yaml file, or mappings; pipeline: folder, hub id or, without workers, a loaded pipeline;
    policy: of items that give none, `None` for the plain pipeline; workers: processes of this machine; ray: address of
    a cluster, or "local", whose actors are then the workers; overwrite: make all again; retry_failed: also what failed
    before; max_failures: stop after as many new ones; stop: ends the render from outside.
    settings: `arguments` of every call where an item does not say otherwise; `base_seed`; `shard`, (i, n) for the i-th
    of n parts, each rendered by a process of its own; and those of `RenderSettings`: batch_size, dtype, device,
    threads, fps, fidelity.

    Raises ManifestError, PolicyError, StorageError, LockedError; what was finished by then stays finished.
    """
    request = prepare(jobs, pipeline, out, policy, **settings)
    return execute(
        request,
        workers=workers,
        ray=ray,
        overwrite=overwrite,
        retry_failed=retry_failed,
        max_failures=max_failures,
        contact_sheet=contact_sheet,
        progress=progress or Progress(0, quiet=True),
        stop=stop or Stop(),
    )


def execute(
    request: Request,
    *,
    workers: int | None,
    ray: str | None,
    overwrite: bool,
    retry_failed: bool,
    max_failures: int | None,
    contact_sheet: bool,
    progress: Progress,
    stop: Stop,
) -> Report:
    """`render`, for a request that was prepared."""
    started, out = time.monotonic(), request.out
    workers = workers if ray is not None else workers or 1
    if request.pipe is not None and (workers != 1 or ray is not None):
        raise DitAccelError("Workers load the pipeline themselves; give its folder or hub id instead of the object.")
    lock = FolderLock(out, request.shard)
    try:
        if request.shard[1] == 1:
            wait_for_workers(out)
            _clean(out, request.worker)
        history = History.read(out)
        plan = request.plan(history, overwrite, retry_failed)
        settings = replace(request.settings, run=history.runs + 1)
        entries = dict(history.entries)
        made = failed = 0
        if plan.todo or plan.adopted or plan.forgotten:
            ledger = Ledger(out, request.worker)
            try:
                forgotten = {item.id: Entry(item.id, FORGOTTEN, settings.run) for item in plan.forgotten}
                ledger.append(forgotten.values())
                entries |= forgotten
                ledger.append(plan.adopted)
                entries |= {entry.id: entry for entry in plan.adopted}
                for entry in _made(request, settings, plan, history, ledger, workers, ray, stop, progress):
                    entries[entry.id] = entry
                    made, failed = made + (entry.state == DONE), failed + (entry.state == FAILED)
                    progress.done(entry)
                    if max_failures is not None and failed >= max_failures:
                        stop.ask()
            finally:
                ledger.close()
                _clean(out, request.worker)
        stopped = ""
        if stop.by_signal:
            stopped = "Interrupted; no file is half-written. Run the same command to go on."
        elif max_failures is not None and failed >= max_failures:
            stopped = f"Stopped after {failed} failed items (--max-failures {max_failures})."
        if contact_sheet and (made or failed or plan.adopted or not (out / SHEET).exists()):
            from dit_accel.render.contact_sheet import write_contact_sheet

            write_contact_sheet(out, request.every, f"Rendered with {Path(settings.pipeline).name}")
        elapsed = time.monotonic() - started
        return Report(
            os.fspath(out),
            request.items,
            entries,
            made,
            failed,
            elapsed,
            stop.by_signal,
            stopped,
            _notes(plan, history),
        )
    finally:
        lock.release()


def _made(
    request: Request,
    settings: RenderSettings,
    plan: Plan,
    history: History,
    ledger: Ledger,
    workers: int | None,
    ray: str | None,
    stop: Stop,
    progress: Progress,
) -> Iterator[Entry]:
    """The ledger's entries of the items to make, as they are finished."""
    if not plan.todo:
        return
    progress.total = len(plan.todo)
    progress.begin(items=len(request.items), to_make=len(plan.todo), out=settings.out)
    batches = batches_of(plan.todo, settings.batch_size)
    attempts = {item.id: history.entries[item.id].attempt for item in plan.todo if item.id in history.entries}
    prefix = "" if request.shard[1] == 1 else f"{request.worker}-"
    results: Iterator[list[Entry]]
    if ray is not None:
        from dit_accel.render.ray_workers import RayWorkers

        job = _job(settings, plan)
        results = RayWorkers(job, ledger, ray, workers, prefix).run(batches, attempts, stop)
    elif workers is not None and workers > 1:
        from dit_accel.render.processes import LocalWorkers

        results = LocalWorkers(_job(settings, plan), ledger, workers, prefix).run(batches, attempts, stop)
    else:
        results = _here(request, settings, batches, attempts, ledger, stop)
    with contextlib.closing(results):  # pyright: ignore[reportArgumentType] - they are generators
        for entries in results:
            yield from entries


def _job(settings: RenderSettings, plan: Plan) -> Job:
    job = Job(settings, {item.id: item for item in plan.todo})
    job.save()
    return job


def _here(
    request: Request,
    settings: RenderSettings,
    batches: Sequence[Sequence[Item]],
    attempts: dict[str, int],
    ledger: Ledger,
    stop: Stop,
) -> Iterator[list[Entry]]:
    """Makes the batches in this process."""
    from dit_accel.render.renderer import Renderer
    from dit_accel.render.storage import temporary_folder
    from dit_accel.render.writer import Writer

    with Renderer(settings, request.worker, request.pipe) as renderer:
        renderer.check([item for batch in batches for item in batch])
        writer = Writer(settings, temporary_folder(request.out, request.worker), request.worker)
        for batch in batches:
            if stop.asked:
                return
            yield from renderer.rendered(batch, ledger, writer, attempts)


def _clean(out: Path, worker: str) -> None:
    """Remove what killed workers left unfinished. worker: of this process; "main" when nobody else is at work here."""
    patterns = ["unfinished-*"] if worker == "main" else [f"unfinished-{worker}", f"unfinished-{worker}-*"]
    for path in (path for pattern in patterns for path in ours(out).glob(pattern)):
        shutil.rmtree(path, ignore_errors=True)


def _notes(plan: Plan, history: History) -> tuple[str, ...]:
    notes = []
    if plan.strangers:
        notes.append(
            f"{plan.strangers} items of the ledger are no longer in the manifest; their files are left as they are."
        )
    if plan.adopted:
        notes.append(f"{len(plan.adopted)} files were whole but not in the ledger; they were entered.")
    if history.torn:
        notes.append(f"{history.torn} lines of the ledgers in {OURS} were torn, and left out.")
    return tuple(notes)
