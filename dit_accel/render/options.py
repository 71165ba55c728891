"""Options of `dit-accel render`; light, as every help text of the command line needs them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "jobs", metavar="JOBS", nargs="?", type=Path, help="manifest: .jsonl, .csv, or .yaml for a sweep"
    )
    parser.add_argument("--pipeline", metavar="DIR|ID", help="folder of a diffusers pipeline, or a hub id")
    parser.add_argument(
        "--policy",
        default="balanced",
        metavar="NAME|FILE",
        help="of items that give none; 'none' is the plain pipeline (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder; what it has already is not made again")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of manifests, and end")
    which = parser.add_argument_group("which items")
    which.add_argument("--resume", action="store_true", default=True, help="make what is not made yet (always so)")
    which.add_argument("--retry-failed", action="store_true", help="also make again what failed before (default: no)")
    which.add_argument("--overwrite", action="store_true", help="make all again (default: no)")
    which.add_argument("--max-failures", type=_count, metavar="N", help="stop after N failed items (default: never)")
    which.add_argument("--shard", metavar="I/N", default="0/1", help="part I of N, from 0 (default: %(default)s, all)")
    how = parser.add_argument_group("how")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="base of the seeds of items without (default: 0)")
    how.add_argument("--steps", type=_count, help="num_inference_steps of items without (default: the pipeline's)")
    how.add_argument("--batch-size", type=_count, default=1, metavar="N", help="most items of a call (default: 1)")
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    how.add_argument("--threads", type=_count, metavar="N", help="torch threads of each worker (default: torch's)")
    how.add_argument("--fps", type=float, default=16, help="of videos (default: %(default)s)")
    how.add_argument("--fidelity", action="store_true", help="also make each item plainly, and measure how far it is")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--workers", type=_count, metavar="N", help="processes (default: 1), or Ray actors (default: one a GPU or CPU)"
    )
    where.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="use a Ray cluster; without an address, one that is started on this machine (default: no Ray)",
    )
    says = parser.add_argument_group("what is said")
    says.add_argument("--dry-run", action="store_true", help="check all, estimate time and disk from one item, and end")
    says.add_argument("--log-json", action="store_true", help="print one JSON object a line instead of text")
    says.add_argument("--no-sheet", action="store_true", help="write no contact-sheet.html (default: write it)")


def _count(word: str) -> int:
    number = int(word) if word.isdecimal() and len(word) < 10 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not allowed; give an integer of at least 1")
    return number
