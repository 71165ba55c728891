"""Command: `dit-accel render`, from its options to what it prints; no framework is loaded before there is work."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
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
# Variables in which launchers tell a process its number and how many there are; those that accelerate reads.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)
OK, SOME_FAILED, INTERRUPTED = 0, 3, 130


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
    """The part of this process, where `accelerate launch`, `torchrun` or an MPI started several of them."""
    for rank_name, world_name in _LAUNCHERS:
        rank, world = environment.get(rank_name, ""), environment.get(world_name, "")
        if rank.isdecimal() and world.isdecimal() and int(rank) < int(world):
            return shard[0] * int(world) + int(rank), shard[1] * int(world)
    return shard


def _dry_run(request: Request, arguments: argparse.Namespace) -> int:
    history = History.read(request.out)
    plan = request.plan(history, arguments.overwrite, arguments.retry_failed)
    facts = {"items": len(request.items), "done": len(plan.done), "failed": len(plan.failed), "to_make": len(plan.todo)}
    text = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in facts.items()) + "."
    if plan.todo:
        from dit_accel.render.probe import estimate

        place = next(path for path in (request.out, *request.out.parents) if path.exists())
        found = estimate(request.settings, plan.todo, arguments.workers or 1, shutil.disk_usage(place).free)
        facts |= {"estimate": found.to_dict()}
        text += "\n" + found.text()
    print(json.dumps({"event": "dry-run"} | facts) if arguments.log_json else text)
    return OK


if __name__ == "__main__":
    from dit_accel.cli import main

    sys.exit(main(["render", *sys.argv[1:]]))
