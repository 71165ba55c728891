"""Faults of batch rendering at length: `kill -9` at random moments of a render, of a Ray actor and of a Ray driver.

    python -m dit_accel.bench.render_faults pipelines/tiny-flux --out docs/results

A fault test that runs for minutes; tests/render/test_workers.py has a few of the same kills.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_accel.files import write_atomically
from dit_accel.testing.renders import actors_of, check_folder, kill_and_resume, pictures, sidecars

_PATIENCE = 300.0  # seconds for a picture to come


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="dit-accel bench render-faults")
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, required=True, help="folder of render-faults.json")
    arguments = parser.parse_args(argv)
    prompts = (arguments.pipeline / "prompts.txt").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = folder / "jobs.jsonl"
        rows = [
            {
                "prompt": prompts[number % len(prompts)],
                "id": f"item-{number:03}",
                "num_inference_steps": arguments.steps,
            }
            for number in range(arguments.items)
        ]
        jobs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        plain = folder / "plain"
        _command(arguments.pipeline, jobs, plain).wait()
        found: dict[str, Any] = {"pipeline": arguments.pipeline.name, "items": arguments.items}
        generator = random.Random(arguments.seed)
        killed = folder / "killed"
        counts = kill_and_resume(arguments.pipeline, jobs, killed, arguments.kills, generator, "exact")
        found["kills of the render"] = asdict(counts) | _same(killed, plain)
        if importlib.util.find_spec("ray") is not None:
            for what in ("actor", "driver"):
                out = folder / f"ray-{what}"
                _ray(arguments.pipeline, jobs, out, what, arguments.items)
                found[f"a kill of a Ray {what}"] = asdict(check_folder(jobs, out)) | {"kills": 1} | _same(out, plain)
    write_atomically(arguments.out / "render-faults.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    faults = [each for each in found.values() if isinstance(each, dict)]
    names = ("lost", "twice", "cut", "left")
    return int(any(each[name] for each in faults for name in names) or not all(each["tree_equal"] for each in faults))


def _same(out: Path, plain: Path) -> dict[str, bool]:
    return {"tree_equal": pictures(out) == pictures(plain) and sidecars(out) == sidecars(plain)}


def _command(pipeline: Path, jobs: Path, out: Path, *words: str) -> subprocess.Popen:
    options = ["--pipeline", os.fspath(pipeline), "--out", os.fspath(out), "--policy", "exact", "--threads", "1"]
    command = [sys.executable, "-m", "dit_accel.cli", "render", os.fspath(jobs), *options, *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _ray(pipeline: Path, jobs: Path, out: Path, what: str, items: int) -> None:
    """Render with two actors, and kill one of them, or the driver, half-way; then run the command until it is done."""
    process = _command(pipeline, jobs, out, "--ray", "--workers", "2")
    until = time.monotonic() + _PATIENCE
    while len(pictures(out)) < items // 2:
        if time.monotonic() > until or process.poll() is not None:
            raise RuntimeError(f"the render with Ray made {len(pictures(out))} pictures only")
        time.sleep(0.05)
    os.kill(actors_of(process.pid)[0] if what == "actor" else process.pid, signal.SIGKILL)
    process.wait()
    if what == "driver" and _command(pipeline, jobs, out, "--ray", "--workers", "2").wait():
        raise RuntimeError("the render did not go on after its driver was killed")


if __name__ == "__main__":
    sys.exit(main())
