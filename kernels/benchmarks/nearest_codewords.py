"""Times nearest_codewords in the C++ kernel against products and argmin in torch; writes JSON and a table.

Every round times torch, then the kernel, on the same vectors, and a ratio is the median over rounds of torch / kernel
within one round, so that a change of load between rounds cancels. Times are process CPU time of one thread, which
background load disturbs least. Whatever a call costs is in it, the checks of arguments included.

    python kernels/benchmarks/nearest_codewords.py --codebooks 256x4 64x2 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

# OpenMP's threads spin for milliseconds after a parallel loop: CPU time that would be counted for whoever runs next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from dit_accel_kernels import nearest_codewords
from machine import record

CODEBOOKS = ["256x4", "256x2", "64x2", "256x1", "64x3", "16x4", "60x5", "4096x4", "256x8", "4096x8", "256x16"]
TARGETS = {"256x4": 4.0, "256x2": 4.0, "64x2": 4.0}  # codebook: the least ratio; 2 for every other
SCORES = 2**24  # of a round: vectors times codewords

Row = dict[str, Any]


def timed(call: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(codebook: str, rounds: int) -> Iterator[Row]:
    """One row without weights and one with them."""
    entries, width = map(int, codebook.split("x"))
    count = SCORES // entries
    torch.manual_seed(0)
    vectors, codewords, costs = torch.randn(count, width), torch.randn(entries, width), torch.rand(count, width)
    for weights in (None, costs):
        base: list[float] = []
        own: list[float] = []
        for _ in range(rounds + 1):  # the first is to warm up
            base.append(timed(lambda weights=weights: nearest_codewords(vectors, codewords, weights, impl="torch")))
            own.append(timed(lambda weights=weights: nearest_codewords(vectors, codewords, weights, impl="cpu")))
        yield {
            "codewords": entries,
            "width": width,
            "weighted": weights is not None,
            "vectors": count,
            "rounds": rounds,
            "torch_million_vectors_a_second": round(count / median(base[1:]) / 1e6, 2),
            "kernel_million_vectors_a_second": round(count / median(own[1:]) / 1e6, 2),
            "ratio": round(median(other / mine for other, mine in zip(base[1:], own[1:])), 1),
            "target": TARGETS.get(codebook, 2.0),
        }


def table(rows: list[Row]) -> str:
    """Speeds and ratios as Markdown; missed targets are marked."""
    lines = ["| codewords x width | weights | torch | kernel | ratio | target |", "|---" * 6 + "|"]
    for row in rows:
        missed = " (missed)" if row["ratio"] < row["target"] else ""
        cells = [f"{row['codewords']} x {row['width']}", "yes" if row["weighted"] else "no"]
        cells += [f"{row[f'{name}_million_vectors_a_second']:.2f}" for name in ("torch", "kernel")]
        lines.append("| " + " | ".join([*cells, f"{row['ratio']:.1f}{missed}", f"{row['target']:.0f}"]) + " |")
    return "\n".join(lines)


def write(folder: Path, rows: list[Row], seconds: float) -> None:
    """All rows as JSON with what is needed to judge or repeat them, and as a Markdown table."""
    made = record(seconds, "process CPU time, one thread") | {"rows": rows}
    (folder / "nearest_codewords.json").write_text(json.dumps(made, indent=1) + "\n")
    load = ", ".join(f"{x:.1f}" for x in made["load_average"])
    (folder / "nearest_codewords.md").write_text(
        f"# nearest_codewords against products and argmin in torch\n\n{made['date']}, `{made['command']}`\n\n"
        f"{made['cpu']}, torch {torch.__version__}; load average {load}: shared with others.\n\nMillions of float32 "
        "vectors a second of CPU time, one thread, and the median of paired rounds of torch's time divided by the "
        f"kernel's; above 1 is faster.\n\n{table(rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codebooks", nargs="+", default=CODEBOOKS, metavar="KxD")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows: list[Row] = []
    for codebook in args.codebooks:
        for row in measure(codebook, args.rounds):
            rows.append(row)
            print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    write(args.out, rows, time.perf_counter() - start)


if __name__ == "__main__":
    main()
