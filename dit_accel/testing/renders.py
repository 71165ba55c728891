"""Renders: manifests of tiny pipelines, and what stands in an output folder, for tests and measurements."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dit_accel.cli import call_defaults, load_pipeline
from dit_accel.render import load_manifest, render, renderer
from dit_accel.render.ledger import DONE
from dit_accel.render.storage import OURS


def manifest(path: Path, count: int, **fields: Any) -> Path:
    """A JSONL manifest of so many different items."""
    rows = [{"prompt": str(number % 9), "id": f"item-{number}"} | fields for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pictures(out: Path) -> dict[str, bytes]:
    """All pictures and videos below a folder, those aside that are being written."""
    files = [path for path in out.rglob("*") if path.suffix in (".png", ".mp4") and OURS not in path.parts]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def sidecars(out: Path) -> dict[str, Any]:
    """All sidecars, without what may differ from one render to the next."""
    found = {}
    for path in out.rglob("*.json"):
        data = json.loads(path.read_bytes())
        del data["made"]
        found[path.relative_to(out).as_posix()] = data
    return found


def ledger_lines(out: Path) -> list[dict[str, Any]]:
    """Every line of every ledger that can be read."""
    lines = []
    for path in sorted((out / OURS).glob("ledger*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


def leftovers(out: Path) -> list[str]:
    """Files that no finished render leaves behind."""
    return [path.name for path in out.rglob("*") if path.suffix == ".tmp" or path.name.startswith("unfinished")]


# ---------------------------------------------------------------------------------------------------------------- kills


@dataclass(frozen=True)
class Cleared:
    """What killing a render again and again came to. kills: that hit it; items: that stand whole in the end; lost,
    twice, cut, torn: items that are not there, that the ledger has more than once, whose file is not what it says, and
    temporary files that are left."""

    kills: int
    items: int
    lost: int = 0
    twice: int = 0
    cut: int = 0
    left: int = 0


def kill_and_resume(folder: Path, jobs: Path, out: Path, kills: int, generator: random.Random, policy: str) -> Cleared:
    """Render with `kill -9` at random moments, until it was hit as often and is finished.

    Each render is a fork of this process, in which the frameworks are loaded already, so nearly all of its time is
    spent at items. It is killed after at most a quarter of the time that a whole render takes: it hits every stage, and
    each render is killed several times. One that finishes is looked at, and everything starts anew.
    """
    hit = 0
    started = time.monotonic()
    _await(_fork(folder, jobs, out, policy))
    span = time.monotonic() - started
    result = check_folder(jobs, out)
    shutil.rmtree(out)
    while hit < kills:
        process = _fork(folder, jobs, out, policy)
        time.sleep(generator.uniform(0.0, span / 4))
        if os.waitpid(process, os.WNOHANG) == (0, 0):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            hit += 1
            continue
        result = _worse(result, check_folder(jobs, out))
        shutil.rmtree(out)
    _await(_fork(folder, jobs, out, policy))
    return replace(_worse(result, check_folder(jobs, out)), kills=hit)


def check_folder(jobs: Path, out: Path) -> Cleared:
    """What stands in the output folder of a finished render."""
    items = load_manifest(jobs)
    lines = [line for line in ledger_lines(out) if line["state"] == DONE]
    entries = {line["id"]: line for line in lines}
    cut = sum(_is_cut(out, entry) for entry in entries.values())
    lost = sum(item.id not in entries for item in items)
    return Cleared(0, len(entries) - cut, lost, len(lines) - len(entries), cut, len(leftovers(out)))


def _is_cut(out: Path, entry: dict[str, Any]) -> bool:
    path = out / entry["file"]
    return not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]


def _worse(a: Cleared, b: Cleared) -> Cleared:
    counts = {name: max(getattr(a, name), getattr(b, name)) for name in ("lost", "twice", "cut", "left")}
    return Cleared(0, min(a.items, b.items), **counts)


def _fork(folder: Path, jobs: Path, out: Path, policy: str) -> int:
    """A process that renders, with its own copy of a pipeline that is loaded once."""
    pipe = _loaded(folder)
    process = os.fork()
    if process:
        return process
    try:
        renderer.load = lambda settings: pipe
        render(jobs, folder, out, policy, threads=1, arguments=call_defaults(folder))
        os._exit(0)
    except BaseException as error:
        print(f"the render failed: {error}", file=sys.stderr)
    os._exit(1)


@functools.cache
def _loaded(folder: Path) -> Any:
    torch.set_num_threads(1)  # threads do not outlive a fork
    return load_pipeline(folder)


def _await(process: int) -> None:
    assert os.waitpid(process, 0)[1] == 0, "an undisturbed render failed"


def actors_of(driver: int) -> list[int]:
    """Process numbers of the Ray actors below a driver; needs psutil, which accelerate brings along."""
    import psutil

    children = psutil.Process(driver).children(recursive=True)
    return [child.pid for child in children if "ray::Worker" in " ".join(child.cmdline())]
