"""Benchmark of batch rendering: overhead over a plain loop, gain of batches, resume, and equal files from any workers.

python -m dit_accel.bench.render pipelines/tiny-flux --prompts pipelines/tiny-flux/prompts.txt --out docs/results
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import dit_accel
from dit_accel.cli import call_defaults, load_pipeline
from dit_accel.files import write_atomically
from dit_accel.render import render
from dit_accel.render.batching import ItemCaller
from dit_accel.render.engine import prepare
from dit_accel.render.renderer import Renderer
from dit_accel.render.writer import versions
from dit_accel.testing.renders import pictures, sidecars


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="dit-accel bench render")
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="one a line; items take them in turn")
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--policy", default="balanced")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5, help="of timings, in turn")
    parser.add_argument("--out", type=Path, required=True, help="folder of render.json, which has one entry a pipeline")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    prompts = [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [
        {"prompt": prompts[number % len(prompts)], "id": f"item-{number:03}", "num_inference_steps": arguments.steps}
        for number in range(arguments.items)
    ]
    found: dict[str, Any] = {
        "items": arguments.items,
        "steps": arguments.steps,
        "policy": arguments.policy,
        "threads": 1,
        "versions": versions(),
        "equal": _equal(rows, arguments.pipeline, arguments.policy),
    }
    pipe = load_pipeline(arguments.pipeline)
    defaults = call_defaults(arguments.pipeline)
    found["overhead"] = _overhead(rows[: max(arguments.batches)], pipe, defaults, arguments.policy, arguments.rounds)
    found["batches"] = _batches(rows, pipe, defaults, arguments.policy, arguments.batches, arguments.rounds)
    path = arguments.out / "render.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_atomically(path, json.dumps(known | {arguments.pipeline.name: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def _equal(rows: Sequence[dict[str, Any]], pipeline: Path, policy: str) -> dict[str, Any]:
    """Render by the command in one process, again as a no-op, and in turned order by two workers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds: dict[str, float] = {}
        orders = {"one": rows, "again": rows, "two": rows[::-1]}
        for word, order in orders.items():
            jobs = folder / f"{word}.jsonl"
            jobs.write_text("".join(json.dumps(row) + "\n" for row in order), encoding="utf-8")
            out = folder / ("one" if word == "again" else word)
            words = ["render", os.fspath(jobs), "--pipeline", os.fspath(pipeline), "--out", os.fspath(out)]
            words += ["--policy", policy, "--threads", "1", "--workers", "2" if word == "two" else "1"]
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "dit_accel.cli", *words], check=True, stdout=subprocess.DEVNULL)
            seconds[word] = round(time.perf_counter() - started, 3)
        return {
            "files": len(pictures(folder / "one")),
            "pictures_equal": pictures(folder / "one") == pictures(folder / "two"),
            "sidecars_equal": sidecars(folder / "one") == sidecars(folder / "two"),
            "seconds": seconds["one"],
            "resume_seconds": seconds["again"],
            "two_workers_seconds": seconds["two"],
        }


def _overhead(
    rows: Sequence[dict[str, Any]], pipe: Any, defaults: dict[str, Any], policy: str, rounds: int
) -> dict[str, Any]:
    """Seconds an item outside the pipeline's call, of the render and of a plain loop that saves its pictures."""
    outside: dict[str, list[float]] = {"render": [], "loop": []}
    inside: dict[str, list[float]] = {"render": [], "loop": []}
    for turn in range(rounds + 1):
        with tempfile.TemporaryDirectory() as name:
            started = time.perf_counter()
            report = render(rows, pipe, name, policy, arguments=defaults, contact_sheet=False)
            total = time.perf_counter() - started
            spent = sum(entry.seconds for entry in report.entries.values())
            loop_total, loop_spent = _loop(rows, pipe, defaults, policy, Path(name))
        if turn:  # the first one warms up
            outside["render"].append((total - spent) / len(rows))
            inside["render"].append(spent / len(rows))
            outside["loop"].append((loop_total - loop_spent) / len(rows))
            inside["loop"].append(loop_spent / len(rows))
    calls = {name: median(values) for name, values in inside.items()}
    rest = {name: median(values) for name, values in outside.items()}
    return {
        "render": {"call seconds": round(calls["render"], 5), "other seconds": round(rest["render"], 5)},
        "loop": {"call seconds": round(calls["loop"], 5), "other seconds": round(rest["loop"], 5)},
        "overhead": round((rest["render"] - rest["loop"]) / (calls["loop"] + rest["loop"]), 5),
    }


def _loop(
    rows: Sequence[dict[str, Any]], pipe: Any, defaults: dict[str, Any], policy: str, folder: Path
) -> tuple[float, float]:
    """Seconds of the loop that a user would write, and those of them in calls."""
    from PIL import Image

    from dit_accel.video import rgb, write_mp4

    started, spent = time.perf_counter(), 0.0
    caller = ItemCaller(pipe)
    with dit_accel.apply(pipe, policy):
        for number, row in enumerate(rows):
            caller.arguments = {
                k: v for k, v in (defaults | row).items() if k not in ("prompt", "id", "num_inference_steps")
            }
            made = caller.make(row["prompt"], number, row["num_inference_steps"])
            spent += made.seconds
            if made.is_video:
                write_mp4(folder / f"loop-{number}.mp4", made.pictures[0], 16)
            else:
                Image.fromarray(rgb(made.pictures[0])).save(folder / f"loop-{number}.png")
    return time.perf_counter() - started, spent


def _batches(
    rows: Sequence[dict[str, Any]],
    pipe: Any,
    defaults: dict[str, Any],
    policy: str,
    sizes: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """Seconds an item for each batch size, in turn, and how far pictures are from those made alone.

    The gain is of processor time: on a machine that is shared, wall time says more about the others.
    """
    with tempfile.TemporaryDirectory() as name:
        request = prepare(rows[: max(sizes)], pipe, name, policy, arguments=defaults)
        items = request.items
        wall: dict[int, list[float]] = {size: [] for size in sizes}
        processor: dict[int, list[float]] = {size: [] for size in sizes}
        made: dict[int, list[torch.Tensor]] = {}
        with Renderer(request.settings, pipe=pipe) as renderer:
            for turn in range(rounds + 1):
                for size in sizes:
                    before = time.perf_counter(), time.process_time()
                    parts = [items[start : start + size] for start in range(0, len(items), size)]
                    results = [one for part in parts for some in renderer.make(part) for one in some]
                    if turn:
                        wall[size].append((time.perf_counter() - before[0]) / len(items))
                        processor[size].append((time.process_time() - before[1]) / len(items))
                    made[size] = [one.picture for one in results if one.picture is not None]
    alone = sizes[0]
    return [
        {
            "batch_size": size,
            "seconds_an_item": round(median(wall[size]), 4),
            "processor_seconds_an_item": round(median(processor[size]), 4),
            "gain": round(median(processor[alone]) / median(processor[size]), 3),
            "largest_difference": max(float((a - b).abs().max()) for a, b in zip(made[size], made[alone])),
        }
        for size in sizes
    ]


if __name__ == "__main__":
    sys.exit(main())
