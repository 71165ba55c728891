"""Ledger: what became of each item, one JSON line each, only ever appended to; a torn line costs that line alone."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dit_accel.render.storage import OURS, ours, storing, sync_folder

DONE, FAILED, FORGOTTEN = "done", "failed", "forgotten"
_NAME = re.compile(r"ledger(-[a-z0-9-]+)?\.jsonl")


@dataclass(frozen=True)
class Entry:
    """One line. run: number of the render, which orders ledgers whatever the clocks say; file: below the output folder;
    size in bytes; sha256 of the file; error: why it failed, in one sentence; attempt: counted from 1; seconds: share of
    the batch's time; batch: items made at once; time: UTC, for people.
    """

    id: str
    state: str
    run: int
    fingerprint: str = ""
    file: str = ""
    size: int = 0
    sha256: str = ""
    error: str = ""
    attempt: int = 1
    seconds: float = 0.0
    batch: int = 1
    worker: str = "main"
    time: str = ""


_FIELDS = {field.name: type(field.default) if field.default != "" else str for field in fields(Entry)}
_FIELDS |= {"id": str, "state": str, "run": int, "seconds": float}


@dataclass(frozen=True)
class History:
    """The latest entry of each item, of all ledgers of a folder. torn: lines that nobody can read."""

    entries: Mapping[str, Entry]
    runs: int
    torn: int

    @classmethod
    def read(cls, out: Path) -> History:
        """Of an output folder; empty where there is none. A line that a crash cut off is left out."""
        latest: dict[str, Entry] = {}
        runs = torn = 0
        folder = out / OURS
        for name in sorted(name for name in _listed(folder) if _NAME.fullmatch(name)):
            with storing(folder / name):
                lines = (folder / name).read_bytes().split(b"\n")
            for line in lines:
                entry = _parsed(line)
                if entry is None:
                    torn += bool(line.strip())
                    continue
                runs = max(runs, entry.run)
                known = latest.get(entry.id)
                if known is None or _rank(entry) >= _rank(known):
                    latest[entry.id] = entry
        return cls(latest, runs, torn)


def _rank(entry: Entry) -> tuple[int, int]:
    """Which of two entries holds: the later run's; within a run items are forgotten first, and done is done."""
    return entry.run, (FORGOTTEN, FAILED, DONE).index(entry.state)


def _listed(folder: Path) -> Iterable[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return ()
    except OSError:
        with storing(folder):
            raise
        return ()


def _parsed(line: bytes) -> Entry | None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not {"id", "state", "run"} <= data.keys():
        return None
    known = {key: value for key, value in data.items() if key in _FIELDS}
    if any(
        not isinstance(value, (int, float) if _FIELDS[key] is float else _FIELDS[key]) for key, value in known.items()
    ):
        return None
    return Entry(**known) if known["state"] in (DONE, FAILED, FORGOTTEN) else None


class Ledger:
    """The ledger that one worker writes. Raises StorageError where the disk refuses."""

    def __init__(self, out: Path, worker: str):
        self.path = ours(out) / ("ledger.jsonl" if worker == "main" else f"ledger-{worker}.jsonl")
        self.worker = worker
        with storing(self.path):
            self._handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            if _last_byte(self.path) not in (b"", b"\n"):
                os.write(self._handle, b"\n")  # so that a torn last line does not tear the next
            os.fsync(self._handle)
        sync_folder(self.path.parent)

    def append(self, entries: Iterable[Entry]) -> None:
        """Write entries, and return once they are on the disk."""
        lines = [json.dumps(_compact(entry, self.worker), ensure_ascii=True) + "\n" for entry in entries]
        data = "".join(lines).encode()
        if not data:
            return
        with storing(self.path):
            size = os.fstat(self._handle).st_size
            try:
                while data:
                    data = data[os.write(self._handle, data) :]
                os.fsync(self._handle)
            except OSError:
                os.ftruncate(self._handle, size)  # a half line is of no use, and would tear the next one
                raise

    def close(self) -> None:
        os.close(self._handle)


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        return file.read()


def _compact(entry: Entry, worker: str) -> dict[str, Any]:
    data = {key: value for key, value in asdict(entry).items() if value not in ("", 0, 0.0)}
    if "seconds" in data:
        data["seconds"] = round(entry.seconds, 4)
    return data | {"worker": worker, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
