"""Several processes: the same files as from one, whoever is killed and whenever."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dit_accel
from dit_accel.cli import main
from dit_accel.render import prepare, processes
from dit_accel.render.command import launched_part
from dit_accel.render.ledger import Ledger
from dit_accel.render.processes import LocalWorkers
from dit_accel.render.settings import Job
from dit_accel.render.stop import Stop
from dit_accel.testing.renders import (
    Cleared,
    actors_of,
    kill_and_resume,
    ledger_lines,
    leftovers,
    manifest,
    pictures,
    sidecars,
)

ROOT = Path(dit_accel.__file__).parents[1]
COUNT = 10
SETTINGS = {"num_inference_steps": 12}


def command(jobs: Path, folder: Path, out: Path, *words: str) -> list[str]:
    options = ["--pipeline", str(folder), "--out", str(out), "--policy", "fora", "--threads", "1"]
    return [sys.executable, "-m", "dit_accel.cli", "render", str(jobs), *options, *words]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifest(tmp_path_factory.mktemp("jobs") / "jobs.jsonl", COUNT, **SETTINGS)


@pytest.fixture(scope="module")
def plain(jobs: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one undisturbed process makes."""
    out = tmp_path_factory.mktemp("plain") / "out"
    options = ["--policy", "fora", "--threads", "1"]
    assert main(["render", str(jobs), "--pipeline", str(folder), "--out", str(out), *options]) == 0
    return out


def check(out: Path, plain: Path) -> None:
    """Nothing lost, nothing twice, nothing cut, all as if undisturbed."""
    assert pictures(out) == pictures(plain) and sidecars(out) == sidecars(plain)
    done = [line["id"] for line in ledger_lines(out)]
    assert len(done) == len({*done}) == len(pictures(plain)) and leftovers(out) == []


@contextlib.contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def wait_for_pictures(out: Path, count: int, process: subprocess.Popen, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while len(pictures(out)) < count:
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.02)


def workers_of(out: Path) -> dict[str, int]:
    """Process numbers of the local workers at work in a folder, by their names."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"dit_accel.render.worker" in words and os.fsencode(out) in words:
                found[words[-2].decode()] = int(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_killed_worker_and_a_killed_render_lose_nothing(
    jobs: Path, folder: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = command(jobs, folder, out, "--workers", "2")
    with started(words) as process:
        wait_for_pictures(out, 2, process)
        workers = workers_of(out)
        assert sorted(workers) == ["w0", "w1"]
        os.kill(workers["w1"], signal.SIGKILL)
        wait_for_pictures(out, 5, process)
        process.kill()
        process.wait()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not workers_of(out)
    check(out, plain)


def test_kills_at_random_moments(jobs: Path, folder: Path, plain: Path, tmp_path: Path) -> None:
    """A few here; `make render-faults` has many."""
    found = kill_and_resume(folder, jobs, tmp_path / "out", kills=6, generator=random.Random(0), policy="fora")
    assert found == Cleared(kills=6, items=COUNT)
    check(tmp_path / "out", plain)


def test_parts_are_rendered_apart(
    jobs: Path, folder: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, and as a launcher has them."""
    out = tmp_path / "out"
    assert main(["render", *command(jobs, folder, out, "--shard", "0/3")[4:]]) == 0
    for number in range(1, 3):
        with monkeypatch.context() as patched:
            patched.setenv("RANK", str(number))
            patched.setenv("WORLD_SIZE", "3")
            assert main(["render", *command(jobs, folder, out)[4:]]) == 0
    assert "10 of 10 items, 0 failed" in (out / "contact-sheet.html").read_text()
    check(out, plain)
    assert main(["render", *command(jobs, folder, out)[4:]]) == 0
    check(out, plain)


def test_launchers_tell_each_process_its_part() -> None:
    assert launched_part((0, 1), {}) == (0, 1)
    assert launched_part((0, 1), {"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    parts = [launched_part((shard, 3), {"RANK": str(rank), "WORLD_SIZE": "2"}) for shard in range(3) for rank in (0, 1)]
    assert parts == [(number, 6) for number in range(6)]
    assert launched_part((1, 3), {"RANK": "x", "WORLD_SIZE": "2"}) == (1, 3)


def test_an_item_that_kills_its_worker_fails_alone(
    folder: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module on the path of the workers makes one prompt deadly."""
    deadly = (
        "import os, sys\n"
        "if 'dit_accel.render.worker' in ' '.join(getattr(sys, 'orig_argv', [])):\n"
        "    import dit_accel.render.batching as batching\n"
        "    make = batching.ItemCaller.make_items\n"
        "    def make_items(self, items):\n"
        "        if any(item.id == 'item-1' for item in items):\n"
        "            os._exit(9)\n"
        "        return make(self, items)\n"
        "    batching.ItemCaller.make_items = make_items\n"
    )
    (tmp_path / "sitecustomize.py").write_text(deadly)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(processes, "MOST_DEATHS", 2)
    few, out = manifest(tmp_path / "few.jsonl", 3, **SETTINGS), tmp_path / "out"
    code = main(["render", *command(few, folder, out, "--workers", "2")[4:]])
    failed = [line for line in ledger_lines(out) if line["state"] == "failed"]
    assert code == 3 and [line["id"] for line in failed] == ["item-1"] and "died 2 times" in failed[0]["error"]
    assert pictures(out) == {
        name: data for name, data in pictures(plain).items() if name in ("item-0.png", "item-2.png")
    }


def test_bad_input_of_workers_is_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = [{"prompt": "3", "id": "x", "num_inference_steps": 3}]
    request = prepare(rows, folder, out, "balanced")
    job = Job(request.settings, {item.id: item for item in request.items})
    job.save()
    workers = LocalWorkers(job, Ledger(out, "main"), 1, "")
    with pytest.raises(dit_accel.ManifestError, match="item 1: num_inference_steps is 3, too few for the policy"):
        list(workers.run([request.items], {}, Stop()))
    assert Job.load(out / ".dit-accel" / "job.jsonl") == job


# ------------------------------------------------------------------------------------------------------------------ Ray


@pytest.fixture(scope="module")
def ray() -> Any:
    return pytest.importorskip("ray")


def test_ray_with_a_killed_actor(ray: Any, jobs: Path, folder: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(command(jobs, folder, out, "--ray", "--workers", "2")) as process:
        wait_for_pictures(out, 2, process)
        actors = actors_of(process.pid)
        assert len(actors) == 2
        os.kill(actors[0], signal.SIGKILL)
        assert process.wait(timeout=180) == 0, process.communicate()
    check(out, plain)


def test_ray_that_is_not_there(
    jobs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["render", *command(jobs, folder, tmp_path / "out", "--ray")[4:]]) == 4
    assert "pip install 'dit-accel[ray]'" in capfd.readouterr().err
