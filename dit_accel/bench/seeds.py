"""Seeds: how much results differ between trainings of different seeds, from what the other benches recorded.

    python -m dit_accel.bench.seeds pipelines/tiny-dit runs/tiny-dit-1-out runs/tiny-dit-2-out

Each folder needs training.json and, in results/, captions.json, dynamics.json and compare-balanced/comparison.json; the
table is written to results/seeds.json and seeds.md of the first, whose weights are the committed ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.bench.dynamics import INTERVALS, ORDERS
from dit_accel.errors import ArgumentError
from dit_accel.files import write_atomically


def gather(folder: Path) -> dict[str, float]:
    """Name -> number, of one training."""
    training, captions, dynamics, comparison = (
        _read(folder / name)
        for name in (
            "training.json",
            "results/captions.json",
            "results/dynamics.json",
            "results/compare-balanced/comparison.json",
        )
    )
    found = {"seed": training["seed"], "final loss": training["final_loss"], "captions": captions["samples"]}
    for head, value in captions["plain"]["satisfied"].items():
        found[f"caption satisfied: {head}"] = value["share"]
    found["items of the forecast error"] = dynamics["items"]
    for interval in INTERVALS:
        for order in ORDERS:
            key = f"every {interval}, order {order}"
            found[f"forecast error, {key}"] = dynamics["trained"]["forecast_error"][key]
    found["correlation of first block and stack"] = dynamics["trained"]["head_stack_correlation"]
    found["items of the presets"] = len(comparison["items"])
    for name in ("accelerated", "fewer"):
        way = comparison[name]
        label = "balanced" if name == "accelerated" else "fewer steps"
        found[f"{label}, FLOPs share"] = way["flops_share"]
        found[f"{label}, PSNR mean"], found[f"{label}, PSNR worst"] = way["psnr"]["mean"], way["psnr"]["worst"]
    return found


def table(rows: Sequence[dict[str, float]]) -> str:
    """Markdown: one column a seed, then their mean and standard deviation."""
    head = ["", *(f"seed {row['seed']:g}" for row in rows), "mean", "standard deviation"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in rows[0]:
        if name == "seed":
            continue
        values = [row[name] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells = [f"{value:.4g}" for value in (*values, statistics.fmean(values), spread)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ArgumentError(
            f"There is no {path}; make it with dit_accel.bench.captions, .dynamics or dit-accel compare."
        )
    return json.loads(path.read_text())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="the committed pipeline first")
    arguments = parser.parse_args(argv)
    rows = [gather(folder) for folder in arguments.folders]
    results = arguments.folders[0] / "results"
    write_atomically(results / "seeds.json", json.dumps(rows, indent=1) + "\n")
    write_atomically(results / "seeds.md", table(rows) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
