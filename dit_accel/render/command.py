"""Command: `dit-accel render`, its options and what it prints; no framework is loaded before there is work."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.render.engine import Request, execute, prepare
from dit_accel.render.fields import LARGEST_SEED, schema
from dit_accel.render.ledger import History
from dit_accel.render.plan import parse_shard
from dit_accel.render.progress import Progress
from dit_accel.render.report import Report
from dit_accel.render.stop import Stop

PLAIN = "none"  # as a policy: the pipeline as it is
OK, SOME_FAILED, INTERRUPTED = 0, 3, 130


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
    where.add_argument("--workers", type=_count, default=1, metavar="N", help="processes, or Ray actors (default: 1)")
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


def run(arguments: argparse.Namespace, call_arguments: Mapping[str, Any]) -> int:
    """Render; returns the exit code. call_arguments: of items that do not say otherwise.

    Raises DitAccelError, which is bad input, and KeyboardInterrupt.
    """
    if arguments.schema:
        print(json.dumps(schema(), indent=2))
        return OK
    missing = [name for name in ("jobs", "pipeline", "out") if getattr(arguments, name) is None]
    if missing:
        names = " and ".join("JOBS" if name == "jobs" else f"--{name}" for name in missing)
        raise DitAccelError(f"{names} is missing; give for example: render jobs.jsonl --pipeline DIR --out DIR.")
    if not 0 <= arguments.seed <= LARGEST_SEED:
        raise DitAccelError(f"--seed {arguments.seed} is not allowed; give an integer from 0 to {LARGEST_SEED}.")
    if not 0.1 <= arguments.fps <= 1000:
        raise DitAccelError(f"--fps {arguments.fps} is not allowed; give 0.1 to 1000 frames a second.")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise DitAccelError(f"--out {arguments.out} is a file; give a folder.")
    request = prepare(
        arguments.jobs,
        arguments.pipeline,
        arguments.out,
        None if arguments.policy == PLAIN else arguments.policy,
        arguments=call_arguments,
        base_seed=arguments.seed,
        shard=launched_part(parse_shard(arguments.shard), os.environ),
        dtype=arguments.dtype,
        device=arguments.device,
        threads=arguments.threads,
        batch_size=arguments.batch_size,
        fps=arguments.fps,
        fidelity=arguments.fidelity,
    )
    if arguments.dry_run:
        return _dry_run(request, arguments)
    stop = Stop()
    progress = Progress(len(request.items), arguments.log_json)
    with stop.listening():
        report = execute(
            request,
            workers=arguments.workers,
            ray=arguments.ray,
            overwrite=arguments.overwrite,
            retry_failed=arguments.retry_failed,
            max_failures=arguments.max_failures,
            contact_sheet=not arguments.no_sheet,
            progress=progress,
            stop=stop,
        )
    progress.end(**report.to_dict())
    if not arguments.log_json:
        print(report.table())
    return exit_code(report)


def exit_code(report: Report) -> int:
    """0 all is done, 3 some items failed, 130 interrupted."""
    return INTERRUPTED if report.interrupted else SOME_FAILED if report.failed else OK


def launched_part(shard: tuple[int, int], environment: Mapping[str, str]) -> tuple[int, int]:
    """The part of this process, where `accelerate launch` or `torchrun` started several of them."""
    rank, world = environment.get("RANK", ""), environment.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        return shard
    return shard[0] * int(world) + int(rank), shard[1] * int(world)


def _dry_run(request: Request, arguments: argparse.Namespace) -> int:
    history = History.read(request.out)
    plan = request.plan(history, arguments.overwrite, arguments.retry_failed)
    facts = {"items": len(request.items), "done": len(plan.done), "failed": len(plan.failed), "to_make": len(plan.todo)}
    text = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in facts.items()) + "."
    if plan.todo:
        from dit_accel.render.probe import estimate

        place = next(path for path in (request.out, *request.out.parents) if path.exists())
        found = estimate(request.settings, plan.todo, arguments.workers, shutil.disk_usage(place).free)
        facts |= {"estimate": found.to_dict()}
        text += "\n" + found.text()
    print(json.dumps({"event": "dry-run"} | facts) if arguments.log_json else text)
    return OK


def _count(word: str) -> int:
    number = int(word) if word.isdecimal() and len(word) < 10 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not allowed; give an integer of at least 1")
    return number


if __name__ == "__main__":
    from dit_accel.cli import main

    sys.exit(main(["render", *sys.argv[1:]]))
