"""Storage: files that are whole and on the disk, or absent, whatever stops the process."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dit_accel.errors import DitAccelError

OURS = ".dit-accel"  # folder in the output folder; no item's name starts with a dot
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StorageError(DitAccelError, OSError):
    """The output folder cannot be written to: the render stops, and can be gone on with once that is put right."""


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into one sentence."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "free some space" if error.errno in _FULL else "make it writable, or give another --out"
        raise StorageError(
            f"{path} cannot be written ({reason}), so the render stopped; {fix}, and run the same command again."
        ) from error


def ours(out: Path) -> Path:
    """The folder of ledgers and locks in an output folder; both are made where they are missing."""
    with storing(out):
        (out / OURS).mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            tempfile.TemporaryFile(dir=out).close()  # says why
    return out / OURS


def temporary_folder(out: Path, worker: str) -> Path:
    """An empty folder for the unfinished files of one worker, on the disk of the output folder."""
    path = ours(out) / f"unfinished-{worker}"
    with storing(path):
        shutil.rmtree(path, ignore_errors=True)  # of a worker of this name that was killed
        path.mkdir()
    return path


def place_of(out: Path, relative: str) -> Path:
    """The path of a file below the output folder, with the folders on the way made; links out of it are refused."""
    path = out / relative
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.resolve().is_relative_to(out.resolve()):
        raise StorageError(f"{path.parent} is a link out of the output folder; remove the link, or give another name.")
    return path


def put(temporary: Path, path: Path) -> None:
    """Make a finished temporary file the file at `path`, durably: content first, then its name."""
    with storing(path):
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)


def sync_folder(path: Path) -> None:
    """See to it that the names in a folder outlast a loss of power; where the system has no way to, they may not."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
