"""The output folder: ledgers, locks, and what disks and other renders do to it; always a clear line, a clean resume."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dit_accel
from dit_accel.render import ledger as ledgers
from dit_accel.render.ledger import DONE, FAILED, FORGOTTEN, Entry, History, Ledger
from dit_accel.render.lock import FolderLock, LockedError, hold_as_worker, wait_for_workers
from dit_accel.render.names import checked_output
from dit_accel.render.storage import OURS, StorageError, place_of
from dit_accel.testing.renders import ledger_lines, leftovers, manifest, pictures, sidecars

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(dit_accel.__file__).parents[1]


# -------------------------------------------------------------------------------------------------------------- ledgers


def write(out: Path, worker: str, *entries: Entry) -> Path:
    ledger = Ledger(out, worker)
    ledger.append(entries)
    ledger.close()
    return ledger.path


def test_a_torn_ledger_loses_its_torn_line_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "main", Entry("a", DONE, 1), Entry("b", DONE, 1, error="ü"))
    whole = path.read_bytes()
    for cut in (*range(0, len(whole), 7), len(whole) - 2, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:cut])
        found = History.read(tmp_path).entries
        assert [*found] == [*"ab"][: whole[:cut].count(b"}")]
        write(tmp_path, "main", Entry("c", DONE, 1))
        assert {"c", *found} == History.read(tmp_path).entries.keys()


@pytest.mark.parametrize(
    "line",
    [
        *(b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 9999, b"\0" * 50, b'{"id": 3, "state": "done", "run": 1}'),
        *(b'{"id": "x", "state": "lost", "run": 1}', b'{"id": "x", "state": "done", "run": "1"}'),
    ],
)
def test_lines_that_are_none_are_left_out(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path, "main", Entry("a", DONE, 1))
    path.write_bytes(line + b"\n" + path.read_bytes() + b'{"id": "b", "state": "failed", "run": 3, "later": 1}\n')
    history = History.read(tmp_path)
    assert {key: entry.state for key, entry in history.entries.items()} == {"a": DONE, "b": FAILED}
    assert history.torn == 1 and history.runs == 3


def test_the_later_run_holds_whichever_ledger_it_is_in(tmp_path: Path) -> None:
    write(tmp_path, "w1", Entry("a", DONE, 1), Entry("b", FAILED, 2), Entry("c", DONE, 2))
    write(tmp_path, "main", Entry("a", FORGOTTEN, 3), Entry("b", DONE, 1), Entry("c", FAILED, 2))
    found = {key: (entry.state, entry.run) for key, entry in History.read(tmp_path).entries.items()}
    assert found == {"a": (FORGOTTEN, 3), "b": (FAILED, 2), "c": (DONE, 2)}


# ---------------------------------------------------------------------------------------------------------------- locks


def test_one_render_at_a_time(run: Run, tmp_path: Path) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 2), tmp_path / "out"
    lock = FolderLock(out)
    code, _, err = run(jobs, out)
    assert code == 2 and f"in use by a render that is still running (process {os.getpid()} on" in err
    with pytest.raises(LockedError):
        FolderLock(out, (0, 2))
    lock.release()
    assert run(jobs, out)[0] == 0


def test_parts_share_a_folder(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path, (0, 2)), FolderLock(tmp_path, (1, 2))
    for part, words in (((0, 1), "in use"), ((1, 2), "part 1 of 2"), ((0, 3), "in other parts")):
        with pytest.raises(LockedError, match=words):
            FolderLock(tmp_path, part)
    first.release()
    second.release()
    FolderLock(tmp_path, (2, 3)).release()
    FolderLock(tmp_path).release()


HOLD = (
    "import time; from dit_accel.render.lock import *; from pathlib import Path; {}; print(1, flush=True); "
    "time.sleep(60)"
)


@pytest.fixture
def holder() -> Iterator[Callable[[str], subprocess.Popen]]:
    processes: list[subprocess.Popen] = []

    def start(code: str) -> subprocess.Popen:
        processes.append(subprocess.Popen([sys.executable, "-c", HOLD.format(code)], stdout=subprocess.PIPE, cwd=ROOT))
        assert processes[-1].stdout.readline()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_dead_render_holds_nothing(tmp_path: Path, holder: Any) -> None:
    process = holder(f"lock = FolderLock(Path({str(tmp_path)!r}))")
    with pytest.raises(LockedError, match=f"process {process.pid} on"):
        FolderLock(tmp_path)
    process.kill()
    process.wait()
    os.utime(tmp_path / OURS / "lock", (0, 2**33))  # times of files mean nothing
    FolderLock(tmp_path).release()


def test_workers_of_a_dead_render_are_waited_for(tmp_path: Path, holder: Any) -> None:
    process = holder(f"hold_as_worker(Path({str(tmp_path)!r}))")
    with pytest.raises(LockedError, match="workers of a render that was stopped"):
        wait_for_workers(tmp_path, 0.2)
    process.kill()
    wait_for_workers(tmp_path, 5)
    os.close(hold_as_worker(tmp_path))


def test_the_clock_may_jump(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 3), tmp_path / "out"
    for now in (4e9, 0.0, 2e9):
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda now=now: now)
            patched.setattr(time, "gmtime", lambda now=now, real=time.gmtime: real(now))
            assert run(jobs, out)[0] == 0
        if now == 0.0:
            (out / "item-1.png").unlink()
    assert [line["run"] for line in ledger_lines(out)] == [1, 1, 1, 2] and len(pictures(out)) == 3
    assert [line["time"][:4] for line in ledger_lines(out)] == ["2096"] * 3 + ["2033"]


# ---------------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_stops_the_render_which_then_goes_on(run: Run, tmp_path: Path, small_disk: Path) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 12), small_disk / "out"
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 250_000)
    code, text, err = run(jobs, out)
    line = err.splitlines()[-1]
    assert code == 2 and not text and "No space left on device" in line and "run the same command again" in line
    assert "Traceback" not in err and leftovers(out) == []
    stood = pictures(out)
    assert 0 < len(stood) < 12
    ballast.unlink()
    assert run(jobs, out)[0] == 0
    assert run(jobs, tmp_path / "plain")[0] == 0
    assert pictures(out) == pictures(tmp_path / "plain") and stood.items() <= pictures(out).items()
    done = [entry["id"] for entry in ledger_lines(out)]
    assert len(done) == len({*done}) == 12


@pytest.mark.parametrize("where", range(1, 7))
def test_whichever_write_fails_nothing_is_lost(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: int
) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 3), tmp_path / "out"
    sync, calls = os.fsync, []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2 + where:  # two are of the empty ledger and its folder
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        code, _, err = run(jobs, out)
    assert code in (0, 2) and (code == 0 or "Input/output error" in err), "folders are synced as well as it goes"
    assert leftovers(out) == []
    assert run(jobs, out)[0] == 0 and run(jobs, tmp_path / "plain")[0] == 0
    assert pictures(out) == pictures(tmp_path / "plain") and sidecars(out) == sidecars(tmp_path / "plain")
    done = [entry["id"] for entry in ledger_lines(out)]
    assert sorted(done) == ["item-0", "item-1", "item-2"]


def test_a_folder_that_is_a_file(run: Run, tmp_path: Path) -> None:
    jobs = manifest(tmp_path / "jobs.jsonl", 2)
    (tmp_path / "file").write_text("x")
    code, _, err = run(jobs, tmp_path / "file")
    assert code == 2 and "is a file" in err
    code, _, err = run(jobs, tmp_path / "file" / "out")
    assert code == 2 and "Not a directory" in err and err.count("\n") == 1


def test_a_read_only_disk(run: Run, tmp_path: Path, small_disk: Path) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 2), small_disk / "out"
    assert run(jobs, out)[0] == 0
    stood = pictures(out)
    (out / "item-1.png").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, _, err = run(jobs, out)
    assert code == 2 and "Read-only file system" in err and "make it writable" in err
    assert err.count("\n") == 1
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert run(jobs, out)[0] == 0 and pictures(out) == stood


def test_a_torn_ledger_is_told_and_made_good_from_the_files(run: Run, tmp_path: Path) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 4), tmp_path / "out"
    run(jobs, out)
    stood = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    path = out / OURS / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    code, text, _ = run(jobs, out)
    assert code == 0 and "1 files were whole but not in the ledger" in text and "1 lines of the ledgers" in text
    assert {path: path.stat().st_mtime_ns for path in stood} == stood, "nothing is made twice"
    path.unlink()
    code, text, _ = run(jobs, out)
    assert code == 0 and "4 files were whole" in text
    assert {path: path.stat().st_mtime_ns for path in stood} == stood


def test_files_of_others_are_not_taken_for_ours(run: Run, tmp_path: Path) -> None:
    jobs, out = manifest(tmp_path / "jobs.jsonl", 3), tmp_path / "out"
    run(jobs, out)
    whole = pictures(out)
    (out / OURS / "ledger.jsonl").unlink()
    (out / "item-0.png").write_bytes(whole["item-1.png"])
    (out / "item-1.json").write_text("{")
    data = json.loads((out / "item-2.json").read_text())
    (out / "item-2.json").write_text(json.dumps(data | {"file": "../../etc/passwd"}))
    code, text, _ = run(jobs, out)
    assert code == 0 and "3 in this render" in text and pictures(out) == whole


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cats").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="a link out of the output folder"):
        place_of(tmp_path / "out", "cats/one.png")
    assert place_of(tmp_path / "out", checked_output("dogs/one.png", "line 1")).parent.is_dir()


def test_a_ledger_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path, "main")
    ledger.append([Entry("a", DONE, 1)])
    write = os.write

    def half(handle: int, data: bytes) -> int:
        if b'"b"' in data:
            write(handle, data[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data)

    with monkeypatch.context() as patched:
        patched.setattr(ledgers.os, "write", half)
        with pytest.raises(StorageError, match="No space left"):
            ledger.append([Entry("b", DONE, 1)])
    ledger.append([Entry("c", DONE, 1)])
    history = History.read(tmp_path)
    assert [*history.entries] == ["a", "c"] and history.torn == 0
