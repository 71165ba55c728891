"""Parallel: gates on two ranks that share one sequence (diffusers' Ulysses), ours and the rivals', in CPU processes.

    python -m dit_accel.bench.parallel --out docs/results/parallel.json

Each setting runs on a small Flux with random weights: once in one process, once on two gloo ranks. Told are the steps
that each computed, and how far the result is from that of one process. A gate that goes by its own part of the tokens
may compute on one rank and skip on the other; then the ranks wait for each other, and `hangs` says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from dit_accel import BlockCache, Forecast, Policy
from dit_accel.bench.methods import Attach, cache_dit, diffusers_cache, ours
from dit_accel.bench.results import versions
from dit_accel.files import write_atomically
from dit_accel.testing.ranks import STEPS, ULYSSES, split
from dit_accel.testing.tiny_pipelines import TinyPipeline, build, call

PATIENCE = 30  # seconds that a rank waits for the other
THRESHOLDS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95)


def first_block(threshold: float) -> Attach:
    from diffusers.hooks import FirstBlockCacheConfig

    return diffusers_cache(lambda: FirstBlockCacheConfig(threshold=threshold))


def gated(threshold: float) -> Attach:
    return ours(Policy(BlockCache(threshold, warmup=2, tail=0), Forecast("reuse", order=0)))


def rival(threshold: float) -> Attach:
    return cache_dit(residual_diff_threshold=threshold, max_warmup_steps=2, num_inference_steps=STEPS)


LATE = "cache-dit F1B0"  # fails where it is enabled on a model that is split already
METHODS = {"dit_accel, gate on the probe": gated, "cache-dit F1B0": rival, "diffusers FirstBlockCache": first_block}


def computed(tiny: TinyPipeline, attach: Attach, then: Callable[[], None] = lambda: None) -> tuple[Tensor, str]:
    """The result of a call, and by step 1 where the blocks behind the first ran and 0 where they were skipped.

    then: done between switching the method on and the call.
    """
    model: Any = tiny.pipe.transformer  # pyright: ignore[reportAttributeAccessIssue]
    ran: list[int] = []
    handles = [
        model.x_embedder.register_forward_hook(lambda *_: ran.append(0)),
        model.single_transformer_blocks[-1].attn.register_forward_hook(lambda *_: ran.__setitem__(-1, 1)),
    ]
    detach = attach(tiny.pipe)
    try:
        then()
        return call(tiny, STEPS), "".join(map(str, ran))
    finally:
        detach()
        for handle in handles:
            handle.remove()


def worker(method: str, threshold: float, folder: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))
    tiny, attach = build("flux"), METHODS[method](threshold)
    wanted, alone = computed(tiny, attach)

    halve = partial(split, tiny.pipe.transformer, ULYSSES)  # pyright: ignore[reportAttributeAccessIssue]
    if method != LATE:
        halve()
    made, together = computed(tiny, attach, halve if method == LATE else lambda: None)
    difference = float((made - wanted).abs().max() / wanted.abs().max())
    seen = {"alone": alone, "computed": together, "difference": difference}
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


def measure(method: str, threshold: float) -> dict[str, Any]:
    """Both ranks of one setting."""
    row: dict[str, Any] = {"method": method, "threshold": threshold}
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        step = ["dit_accel.bench.parallel", "--step", method, str(threshold), folder]
        done = subprocess.run([sys.executable, *launch, *step], capture_output=True, text=True)
        files = sorted(Path(folder).glob("*.json"))
        if len(files) < 2:
            reason = [line for line in done.stderr.splitlines() if "Error" in line and "Child" not in line]
            waited = "imed out" in done.stderr or "timeout" in done.stderr or "closed by peer" in done.stderr
            return row | {"failed": "hangs" if waited else (reason or ["no reason given"])[0][:200]}
        ranks = [json.loads(file.read_text()) for file in files]
    return row | {
        "alone": ranks[0]["alone"],
        "computed": [rank["computed"] for rank in ranks],
        "difference": max(rank["difference"] for rank in ranks),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", nargs=3, metavar=("METHOD", "THRESHOLD", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.step:
        worker(arguments.step[0], float(arguments.step[1]), Path(arguments.step[2]))
        return 0
    rows = []
    for method in METHODS:
        for threshold in THRESHOLDS:
            rows.append(measure(method, threshold))
            print(json.dumps(rows[-1]), flush=True)
    report = {
        "command": "python -m dit_accel.bench.parallel",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions("cache_dit"),
        "steps": STEPS,
        "rows": rows,
    }
    if arguments.out is not None:
        write_atomically(arguments.out, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
