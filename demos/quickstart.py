"""Quickstart, behind `make demo`: the shipped tiny-flux pipeline, plain and accelerated; a table and two pictures.

Nothing is downloaded. Takes about two minutes on two CPU cores.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from dit_accel import DitAccelError
from dit_accel.cli import call_defaults, load_pipeline
from dit_accel.compare import compare
from dit_accel.comparison import write_report

ROOT = Path(__file__).resolve().parents[1]
PIPELINE, OUT = ROOT / "pipelines" / "tiny-flux", ROOT / "outputs" / "demo"
PROMPTS = [
    "a red dress on a white background",
    "a blue boot on a black background",
    "a green bag on a gray background",
    "a yellow pullover on a white background",
]
SEEDS = [0, 1]


def main() -> int:
    torch.set_num_threads(2)
    try:
        pipe = load_pipeline(PIPELINE)
        print(f"{PIPELINE.name}: {len(PROMPTS)} prompts x {len(SEEDS)} seeds, three ways each ...", flush=True)
        comparison = compare(pipe, "balanced", PROMPTS, SEEDS, steps=50, arguments=call_defaults(PIPELINE))
        paths = write_report(comparison, OUT)
    except DitAccelError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    print(comparison.table(), comparison.report, sep="\n\n")
    print("\nWrote " + ", ".join(os.path.relpath(path) for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
