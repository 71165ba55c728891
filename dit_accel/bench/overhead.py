"""Overhead: what wrapping costs where nothing is skipped, and whether skipped work turns into saved time.

    python -m dit_accel.bench.overhead pipelines/tiny-flux --out pipelines/tiny-flux/results

Every ratio is of runs taken in turn in one process, median of `--repeats`; operators and host syncs are counted, not
timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel
from dit_accel import Policy
from dit_accel.bench.results import versions
from dit_accel.calls import Caller
from dit_accel.cli import call_defaults, load_pipeline
from dit_accel.files import write_atomically

NEVER = Policy.named("balanced", threshold=1e-12)  # gates every step and skips none


class OperatorCount(TorchDispatchMode):
    """Counts operators, and among them the ones that make the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.operators += 1
        self.syncs += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def in_turn(plain: Callable[[], None], other: Callable[[], None], repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the pairwise ratios other / plain. One uncounted run of each first."""
    plain()
    other()
    pairs = []
    for number in range(repeats):
        order = (plain, other) if number % 2 == 0 else (other, plain)
        seconds = {}
        for run in order:
            started = time.perf_counter()
            run()
            seconds[run] = time.perf_counter() - started
        pairs.append((seconds[plain], seconds[other]))
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="images a call")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)

    # Two pipelines of equal weights: one stays plain, the other keeps its session, as in use, so that attaching and the
    # first run's FLOP count are part of the uncounted first call.
    pipes: list[Any] = [load_pipeline(arguments.pipeline) for _ in range(2)]
    defaults = call_defaults(arguments.pipeline)
    caller = Caller(pipes[0], defaults)
    if caller.guidance is not None:
        defaults[caller.guidance] = 1.0
    prompts = (arguments.pipeline / "prompts.txt").read_text().splitlines()

    def render(pipe: Any, batch: int, steps: int = arguments.steps) -> None:
        seeds = [torch.Generator().manual_seed(i) for i in range(batch)]
        each = [caller.prompt_arguments(prompt) for prompt in prompts[:batch]]
        given = {name: [one[name] for one in each] for name in each[0]}
        if "negative_prompt" in defaults:
            given["negative_prompt"] = [defaults["negative_prompt"]] * batch
        pipe(**defaults | given, generator=seeds, output_type="latent", num_inference_steps=steps)

    report: dict[str, Any] = {"versions": versions(), "steps": arguments.steps, "repeats": arguments.repeats}
    with dit_accel.apply(pipes[1], NEVER):
        render(pipes[1], 1, 20)  # observes and counts FLOPs
        counts = {}
        for name, pipe in (("plain", pipes[0]), ("nothing skipped", pipes[1])):
            with OperatorCount() as counts[name]:
                render(pipe, 1, 20)
    for name, count in counts.items():
        report[f"{name}, per denoiser call"] = {"operators": count.operators / 20, "host_syncs": count.syncs / 20}
    policies = {"nothing skipped": NEVER} | {name: Policy.named(name) for name in ("quality", "balanced", "fast")}
    for batch in arguments.batch:
        for label, policy in policies.items():
            with dit_accel.apply(pipes[1], policy) as session:
                plain, wrapped = (functools.partial(render, pipe, batch) for pipe in pipes)
                first, second, ratio = in_turn(plain, wrapped, arguments.repeats)
                share = session.stats.flops_share
            row = {"plain_s": first, "seconds": second, "wall_ratio": ratio, "flops_share": share}
            report[f"batch {batch}, {label}"] = row | {"wall_over_flops": ratio / share}
            print(
                f"batch {batch}  {label:16s} plain {first:.3f} s  with {second:.3f} s  wall ratio {ratio:.4f}  "
                f"FLOPs share {share:.4f}  wall / FLOPs {ratio / share:.3f}",
                flush=True,
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out / "overhead.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: v for k, v in report.items() if "denoiser call" in k}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
