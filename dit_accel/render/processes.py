"""Processes: several workers on this machine. One that is killed is started again, and its items go on."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dit_accel.errors import DitAccelError, ManifestError
from dit_accel.render.item import Item
from dit_accel.render.ledger import FAILED, Entry, Ledger
from dit_accel.render.lock import LockedError
from dit_accel.render.settings import Job
from dit_accel.render.stop import Stop
from dit_accel.render.storage import StorageError

MOST_DEATHS = 3  # of workers over one batch; of one worker in a row
_KINDS = {"StorageError": StorageError, "ManifestError": ManifestError, "LockedError": LockedError}


class Backlog:
    """Batches that are still to be given out, each with how many workers have died over it."""

    def __init__(self, batches: Sequence[Sequence[Item]]):
        self._batches = [(tuple(item.id for item in batch), 0) for batch in reversed(batches)]
        self._lock = threading.Lock()
        self.in_work = 0

    def take(self) -> tuple[tuple[str, ...], int] | None:
        with self._lock:
            if not self._batches:
                return None
            self.in_work += 1
            return self._batches.pop()

    def finish(self) -> None:
        with self._lock:
            self.in_work -= 1

    def give_back(self, ids: tuple[str, ...], deaths: int) -> list[str]:
        """After a worker died: its items go to the next one, at last one by one; returns those that nobody survives."""
        with self._lock:
            self.in_work -= 1
            if deaths >= MOST_DEATHS and len(ids) == 1:
                return list(ids)
            parts = [(key,) for key in ids] if deaths >= MOST_DEATHS else [ids]
            self._batches += [(part, 1 if len(part) < len(ids) else deaths) for part in parts]
            return []

    @property
    def is_empty(self) -> bool:
        with self._lock:
            return not self._batches and not self.in_work


class LocalWorkers:
    """Workers as processes of this machine. prefix: of their names; count: how many."""

    def __init__(self, job: Job, ledger: Ledger, count: int, prefix: str):
        self.job, self.ledger = job, ledger
        self.names = [f"{prefix}w{number}" for number in range(count)]
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()
        self._is_over = False

    def run(self, batches: Sequence[Sequence[Item]], attempts: Mapping[str, int], stop: Stop) -> Iterator[list[Entry]]:
        """The entries of the batches, as they come."""
        backlog = Backlog(batches)
        results: queue.Queue[list[Entry] | Exception | None] = queue.Queue()
        threads = [
            threading.Thread(target=self._serve, args=(name, backlog, attempts, results, stop), daemon=True)
            for name in self.names[: len(batches)]
        ]
        try:
            for thread in threads:
                thread.start()
            ended = 0
            while ended < len(threads):
                try:
                    result = results.get(timeout=0.5)  # a timeout, so that signals are heard
                except queue.Empty:
                    continue
                if isinstance(result, Exception):
                    raise result
                ended += result is None
                if result:
                    yield result
            if not backlog.is_empty and not stop.asked:
                raise DitAccelError(
                    f"All {len(self.names)} workers died again and again; see what they print, or render with "
                    "--workers 1. What was finished is kept."
                )
        finally:
            self.end()

    def end(self) -> None:
        """End the workers that still live."""
        with self._lock:
            self._is_over = True
            processes = list(self._processes.values())
        for process in processes:
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        for process in processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def _serve(
        self, name: str, backlog: Backlog, attempts: Mapping[str, int], results: queue.Queue, stop: Stop
    ) -> None:
        """Give one worker batches until there are none."""
        deaths_in_a_row = 0
        try:
            while not stop.asked and not self._is_over and deaths_in_a_row < MOST_DEATHS:
                taken = backlog.take()
                if taken is None:
                    if backlog.is_empty or stop.asked:
                        break
                    threading.Event().wait(0.1)  # a batch of a worker that dies may come back
                    continue
                ids, deaths = taken
                entries = self._ask(
                    name, {"ids": ids, "attempts": {k: attempts.get(k, 0) for k in ids}, "again": deaths > 0}
                )
                if entries is not None:
                    deaths_in_a_row = 0
                    backlog.finish()
                    results.put(entries)
                    continue
                deaths_in_a_row += 1
                if not self._is_over:
                    lost = backlog.give_back(ids, deaths + 1)
                    if lost:
                        results.put(self._lose(lost, attempts))
        except Exception as error:
            results.put(error)
        results.put(None)

    def _lose(self, ids: Sequence[str], attempts: Mapping[str, int]) -> list[Entry]:
        entries = [lost_entry(self.job, key, attempts) for key in ids]
        with self._lock:
            self.ledger.append(entries)
        return entries

    def _ask(self, name: str, request: Mapping[str, Any]) -> list[Entry] | None:
        """What a worker answers; `None` where it died."""
        process = self._processes.get(name)
        if process is None or process.poll() is not None:
            process = self._start(name)
            if process is None or self._answer(process) is None:
                return None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it died, or `end` has closed its input
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        answer = self._answer(process)
        return None if answer is None else [Entry(**entry) for entry in answer["entries"]]

    def _start(self, name: str) -> subprocess.Popen[str] | None:
        command = [sys.executable, "-m", "dit_accel.render.worker", self.job.settings.out, name]
        with self._lock:
            if self._is_over:
                return None
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the render, which tells its workers
                env=os.environ | {"DIT_ACCEL_WORKER": name, **_device_of(name)},
            )
            self._processes[name] = process
        return process

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any] | None:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.endswith("\n"):
            process.wait()
            return None
        answer = json.loads(line)
        if "error" in answer:
            if answer["kind"] == "ImportError":
                raise ImportError(answer["error"], name=answer["name"])
            raise _KINDS.get(answer["kind"], DitAccelError)(answer["error"])
        return answer


def _device_of(name: str) -> dict[str, str]:
    """Worker 0 takes the first accelerator, worker 1 the second, ..., where `auto` finds several."""
    return {"LOCAL_RANK": os.environ.get("LOCAL_RANK") or name.rpartition("w")[2]}


def lost_entry(job: Job, key: str, attempts: Mapping[str, int]) -> Entry:
    """The entry of an item that killed each worker that was given it."""
    item = job.items[key]
    error = f"The worker died {MOST_DEATHS} times over this item; give a smaller size, or see what it printed."
    return Entry(key, FAILED, job.settings.run, item.fingerprint, error=error, attempt=attempts.get(key, 0) + 1)
