"""Curves: quality against cost on a trained pipeline, ours beside the rivals, every method swept over its own knob.

python -m dit_accel.bench.curves pipelines/tiny-flux --guidance 3 --out pipelines/tiny-flux/results
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dit_accel.bench.measure import Result, Workload, load_workload, magnitude_ratios
from dit_accel.bench.methods import Method, methods, published
from dit_accel.bench.results import read_results, versions, write_results
from dit_accel.denoiser.find import find_denoisers
from dit_accel.errors import ArgumentError, UnsupportedModelError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="folder of a trained pipeline with dit_accel_defaults.json")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt a line (default: PIPELINE/prompts.txt)")
    parser.add_argument("--items", type=int, default=32, help="prompts used, item i with seed i")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="measure families whose name contains this, keep the others' rows")
    parser.add_argument("--published", action="store_true", help="measure the named methods instead, at their defaults")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)

    workload = load_workload(
        arguments.pipeline, arguments.steps, arguments.guidance, arguments.items, arguments.prompts
    )
    skipped: dict[str, str] = {}
    ratios = None
    if not arguments.published and arguments.only in "diffusers MagCache":
        try:
            ratios = magnitude_ratios(workload)
        except UnsupportedModelError as error:
            skipped["diffusers MagCache"] = str(error)
            print(f"diffusers MagCache is left out: {error}.")
    chosen = published() if arguments.published else methods(arguments.steps, workload.branches, ratios)
    stem = f"{'published' if arguments.published else 'bench'}-guidance-{arguments.guidance:g}"
    kept, kept_about = recorded(arguments.out / stem, workload, arguments.only) if arguments.only else ([], {})
    results = measure_all(workload, [method for method in chosen if arguments.only in method.family], skipped)
    about = {
        "command": f"python -m dit_accel.bench.curves {arguments.pipeline} --guidance {arguments.guidance:g} "
        f"--items {len(workload.prompts)}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "items": len(workload.prompts),
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "left_out": kept_about.get("left_out", {}) | skipped,
    }
    if kept:
        about["kept"] = {"date": kept_about["date"], "families": sorted({row.family for row in kept})}
    write_results([*kept, *results], arguments.out, stem, about)
    return 0


def recorded(path: Path, workload: Workload, only: str) -> tuple[list[Result], dict[str, Any]]:
    """Rows of an earlier record that are not measured now, and its JSON; none where there is no record.

    path: without ending. Raises ArgumentError where it was of other items or steps.
    """
    if not path.with_suffix(".csv").is_file():
        return [], {}
    about = json.loads(path.with_suffix(".json").read_text())
    now = {"items": len(workload.prompts), "steps": workload.steps}
    if any(about[name] != value for name, value in now.items()):
        raise ArgumentError(
            f"{path}.csv holds {about['items']} items of {about['steps']} steps, but this run has {now['items']} of "
            f"{now['steps']}, so their rows cannot stand side by side; give another --out, or leave --only out."
        )
    return [row for row in read_results(path.with_suffix(".csv")) if only not in row.family], about


def measure_all(workload: Workload, chosen: Sequence[Method], skipped: dict[str, str]) -> list[Result]:
    """A row for each method, printed as it comes; one that fails on this pipeline goes to `skipped` with its reason."""
    trained = {name: copy.deepcopy(module) for name, module in find_denoisers(workload.pipe).items()}
    results = []
    bar = tqdm(chosen, disable=None)
    for method in bar:
        bar.set_description(f"{method.family} {method.setting}")
        try:
            row = workload.measure(method)
        except Exception as error:  # a rival may raise anything where it does not know the model
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            skipped[f"{method.family} {method.setting}"] = reason
            bar.write(f"{method.family:36s} {method.setting:10s} left out: {reason}")
        else:
            results.append(row)
            quality = f"{row.psnr_mean:5.1f} dB, worst {row.psnr_worst:5.1f}"
            bar.write(f"{row.family:36s} {row.setting:10s} share {row.share:.3f}  {quality}")
        for name, module in trained.items():  # some leave hooks and patches behind
            setattr(workload.pipe, name, copy.deepcopy(module))
    if not torch.equal(workload.image(0, workload.steps), workload.reference[0]):
        raise RuntimeError(
            "A method left the pipeline changed, so nothing after it counts; measure it alone by --only."
        )
    return results


if __name__ == "__main__":
    raise SystemExit(main())
