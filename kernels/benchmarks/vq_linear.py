"""Times vq_linear on the CPU against `F.linear` with the dense weight; writes JSON and a table.

Every round times the dense layer, then each vector-quantised one, and a ratio is the median over rounds of vq / dense
within one round, so that a change of load between rounds cancels. Times are process CPU time, which background load
disturbs least. Whatever a call costs is in it, the rotation of x and the checks of arguments included. Extra memory is
the growth of the process's peak during one call, in a process of its own.

    python kernels/benchmarks/vq_linear.py --tokens 1 256 --threads 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

# OpenMP's threads spin for milliseconds after a parallel loop: CPU time that would be counted for whoever runs next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from dit_accel_kernels import vq_linear
from machine import record
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {2: (256, 4, 8), 3: (64, 2, 6), 4: (256, 2, 8)}  # bits of a weight: codewords, their width, bits of a code
TARGETS = ((256, 1.05), (64, 1.15), (1, 1.5))  # tokens from which on, and the largest ratio

Row = dict[str, Any]


def quantised(outputs: int, inputs: int, bits: int) -> dict[str, Any]:
    """Arguments of vq_linear for a random weight [outputs, inputs] with rotation."""
    entries, width, code_bits = FORMATS[bits]
    return {
        "codes": torch.randint(0, 256, (outputs, inputs // width * code_bits // 8), dtype=torch.uint8),
        "row_scale": torch.rand(outputs).bfloat16(),
        "codebook": torch.randn(1, entries, width).bfloat16(),
        "code_bits": code_bits,
        "signs": torch.randint(0, 256, (inputs // 8,), dtype=torch.uint8),
        "block": min(1024, inputs & -inputs),
    }


def timed(call: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def rounds_of(outputs: int, inputs: int, tokens: int, wanted: int | None) -> int:
    """Many for what is short, 3 at least."""
    return wanted or max(3, min(41, 2 * 10**10 // (outputs * inputs * (tokens + 20))))


def measure(shape: tuple[int, int], tokens: int, dtype: str, threads: int, args: argparse.Namespace) -> Iterator[Row]:
    """One row for each number of bits; all are timed within the same rounds."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    x = torch.randn(tokens, shape[1]).to(DTYPES[dtype])
    dense = torch.randn(shape).to(DTYPES[dtype])
    weights = {bits: quantised(*shape, bits) for bits in args.bits}
    rounds = rounds_of(*shape, tokens, args.rounds)
    base: list[float] = []
    times: dict[int, list[float]] = {bits: [] for bits in weights}
    for _ in range(rounds + 1):  # the first is to warm up
        base.append(timed(lambda: F.linear(x, dense)))
        for bits, weight in weights.items():
            times[bits].append(timed(lambda weight=weight: vq_linear(x, **weight, impl=args.impl)))
    for bits, found in times.items():
        ratio = median(own / other for own, other in zip(found[1:], base[1:]))
        yield {
            "outputs": shape[0],
            "inputs": shape[1],
            "tokens": tokens,
            "dtype": dtype,
            "threads": threads,
            "bits": bits,
            "rounds": rounds,
            "dense_ms": round(median(base[1:]) * 1e3, 2),
            "vq_ms": round(median(found[1:]) * 1e3, 2),
            "ratio": round(ratio, 3),
        }


def cases(args: argparse.Namespace) -> Iterator[tuple[tuple[int, int], int, str, int]]:
    """(shape, tokens, dtype, threads). The first shape comes in everything, others in one thread and float32."""
    for place, shape in enumerate(args.shapes):
        for threads in args.threads if place == 0 else args.threads[:1]:
            for dtype in args.dtype if place == 0 and threads == args.threads[0] else args.dtype[:1]:
                for tokens in args.tokens:
                    if place == 0 or tokens <= 1024:
                        yield shape, tokens, dtype, threads


def peak() -> float:
    """Peak memory of this process so far in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 10)


def extra_peak(shape: tuple[int, int], tokens: int, bits: int) -> float:
    """MiB by which one call raises the peak of this process, result included; bits 0: the dense layer."""
    torch.set_num_threads(1)
    small = torch.zeros(tokens, 64)  # what a first call loads and compiles is not the call's
    vq_linear(small, **quantised(64, 64, bits or 2))
    F.linear(small, torch.zeros(64, 64))
    x = torch.randn(tokens, shape[1])
    call: Callable[[], Tensor]
    if bits:
        weight = quantised(*shape, bits)
        call = lambda: vq_linear(x, **weight)  # noqa: E731
    else:
        dense = torch.zeros(shape).add_(1.0)
        call = lambda: F.linear(x, dense)  # noqa: E731
    before = peak()
    call()
    return peak() - before


def memory(args: argparse.Namespace) -> Iterator[Row]:
    """Extra peak of 256 tokens for the dense layer and each number of bits, each in a fresh process."""
    shape, tokens = args.shapes[0], 256
    for bits in (0, *args.bits):
        command = [sys.executable, __file__, "--peak", *map(str, (*shape, tokens, bits))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        yield {
            "outputs": shape[0],
            "inputs": shape[1],
            "tokens": tokens,
            "bits": bits or "dense",
            "output_mib": round(4 * tokens * shape[0] / 2**20, 1),
            "extra_peak_mib": round(float(done.stdout), 1),
        }


def target_of(tokens: int) -> float:
    return next(ratio for least, ratio in TARGETS if tokens >= least)


def table(rows: list[Row]) -> str:
    """Ratios as Markdown: a line for each case, a column for each number of bits; missed targets are marked."""
    bits = sorted({row["bits"] for row in rows})
    lines = [
        "| weight [O x I] | dtype | threads | tokens | dense ms | "
        + " | ".join(f"{b} bit" for b in bits)
        + " | target |",
        "|---" * (6 + len(bits)) + "|",
    ]
    names = ("outputs", "inputs", "dtype", "threads", "tokens")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        own = {row["bits"]: row for row in rows if tuple(row[name] for name in names) == key}
        target = target_of(key[-1])
        cells = [f"{own[b]['ratio']:.2f}{' (missed)' if own[b]['ratio'] > target else ''}" for b in bits]
        head = [f"{key[0]} x {key[1]}", key[2], key[3], key[4], own[bits[0]]["dense_ms"]]
        lines.append("| " + " | ".join(map(str, [*head, *cells, target])) + " |")
    return "\n".join(lines)


def write(folder: Path, rows: list[Row], peaks: list[Row], seconds: float) -> None:
    """All rows as JSON with what is needed to judge or repeat them, and as a Markdown table."""
    made = record(seconds, "process CPU time") | {"rows": rows, "memory": peaks}
    (folder / "vq_linear.json").write_text(json.dumps(made, indent=1) + "\n")
    load = ", ".join(f"{x:.1f}" for x in made["load_average"])
    text = (
        f"# vq_linear against F.linear\n\n{made['date']}, `{made['command']}`\n\n{made['cpu']}, torch "
        f"{torch.__version__}; load average {load}: shared with others.\n\nCPU time of vq_linear divided by that of "
        "the dense layer, median of paired rounds; below 1 is faster. Rotation of x (block 1024) included.\n\n"
        f"{table(rows)}\n"
    )
    if peaks:
        text += "\nGrowth of the peak memory during one call, float32, one thread, in a fresh process:\n\n"
        text += "| weight | tokens | bits | extra peak MiB | of it the result MiB |\n|---|---|---|---|---|\n"
        for row in peaks:
            text += f"| {row['outputs']} x {row['inputs']} | {row['tokens']} | {row['bits']} "
            text += f"| {row['extra_peak_mib']} | {row['output_mib']} |\n"
    (folder / "vq_linear.md").write_text(text)


def shape_of(text: str) -> tuple[int, int]:
    outputs, inputs = text.split("x")
    return int(outputs), int(inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [(3072, 3072), (12288, 3072), (3072, 12288)]
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=shapes, metavar="OxI")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 1024, 4096])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], choices=FORMATS)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, help="default: from 3 to 41, by the size")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--peak", type=int, nargs=4, help=argparse.SUPPRESS)  # what `memory` runs
    args = parser.parse_args()
    if args.peak:
        print(extra_peak((args.peak[0], args.peak[1]), *args.peak[2:]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows: list[Row] = []
    peaks = list(memory(args))
    with torch.inference_mode():
        for case in cases(args):
            for row in measure(*case, args):
                rows.append(row)
                print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            write(args.out, rows, peaks, time.perf_counter() - start)


if __name__ == "__main__":
    main()
