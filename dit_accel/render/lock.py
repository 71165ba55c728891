"""Lock: one render at a time in a folder, or the parts of one. The system holds it, so it dies with its process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dit_accel.errors import DitAccelError
from dit_accel.render.storage import ours, storing

try:
    import fcntl
except ImportError:  # Windows; there two renders in one folder are not kept apart
    fcntl = None

_PATIENCE = 2.0  # seconds that a part waits for another one that is just starting
_ORPHANS = 60.0  # seconds that workers of a killed render are given to end


class LockedError(DitAccelError, RuntimeError):
    """Another render is at work in the folder."""


class FolderLock:
    """Held from construction to `release()`, or to the end of the process, however it ends.

    part: (number, of how many) where several processes share a folder, each with its own part of the items. No clock
    and no process number decides anything, so neither a jump of the clock nor a stale file can stop a render.
    Raises LockedError.
    """

    def __init__(self, out: Path, part: tuple[int, int] = (0, 1)):
        folder, (number, count) = ours(out), part
        self._handles: list[int] = []
        try:
            if count == 1:
                self._take(folder / "lock", "a render", exclusive=True)
            else:
                self._join(folder / "lock", count)
                self._take(folder / f"lock-{number}-of-{count}", f"part {number} of {count}", exclusive=True)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        while self._handles:
            os.close(self._handles.pop())

    def _join(self, path: Path, count: int) -> None:
        """Share the folder with other parts of as many."""
        until = time.monotonic() + _PATIENCE
        while True:
            if self._try(path, exclusive=True):
                self._sign(count)
                self._share()
                return
            if self._try(path, exclusive=False):
                text = os.read(self._handles[-1], 4096)
                if f'"parts": {count},'.encode() in text:
                    return
                raise LockedError(
                    f"{path.parent.parent} is in use by a render in other parts ({_described(text)}); wait for it, "
                    "or give another --out."
                )
            if time.monotonic() > until:
                raise self._refusal(path, "a render")
            time.sleep(0.05)

    def _take(self, path: Path, what: str, exclusive: bool) -> None:
        until = time.monotonic() + (_PATIENCE if what != "a render" else 0.0)
        while not self._try(path, exclusive):
            if time.monotonic() > until:
                raise self._refusal(path, what)
            time.sleep(0.05)
        self._sign(1)

    def _refusal(self, path: Path, what: str) -> LockedError:
        with storing(path):
            text = path.read_bytes()
        return LockedError(
            f"{path.parent.parent} is in use by {what} that is still running ({_described(text)}); wait for it, stop "
            "it, or give another --out."
        )

    def _try(self, path: Path, exclusive: bool) -> bool:
        with storing(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if _locked(handle, exclusive):
            self._handles.append(handle)
            return True
        os.close(handle)
        return False

    def _sign(self, count: int) -> None:
        """Write down who holds the lock that was just taken; only for messages."""
        os.ftruncate(self._handles[-1], 0)
        os.write(self._handles[-1], _holder(count))

    def _share(self) -> None:
        if fcntl is not None:
            fcntl.flock(self._handles[-1], fcntl.LOCK_SH)


def hold_as_worker(out: Path) -> int:
    """Show that a worker is at work in a folder until this process ends; returns the handle that does."""
    handle = os.open(ours(out) / "workers", os.O_RDWR | os.O_CREAT, 0o644)
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def wait_for_workers(out: Path, seconds: float = _ORPHANS) -> None:
    """Wait until workers of a killed render have ended: two at one item would make it twice. Raises LockedError."""
    path = ours(out) / "workers"
    with storing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        until = time.monotonic() + seconds
        while not _locked(handle, exclusive=True):
            if time.monotonic() > until:
                raise LockedError(
                    f"{out} is in use by workers of a render that was stopped; stop them, and run the same command "
                    "again."
                )
            time.sleep(0.05)
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a file's lock for a moment; whoever else wants it waits."""
    with storing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _locked(handle: int, exclusive: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _holder(count: int) -> bytes:
    return json.dumps({"parts": count, "process": os.getpid(), "host": socket.gethostname()}).encode()


def _described(text: bytes) -> str:
    try:
        data = json.loads(text)
        return f"process {int(data['process'])} on {str(data['host'])[:60]}"
    except (ValueError, KeyError, TypeError):
        return "process unknown"
