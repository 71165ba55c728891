"""Times block-sparse attention on the CPU against `F.scaled_dot_product_attention`; writes CSV, JSON and a chart.

Every round times dense attention, then each candidate, and a ratio is the median over rounds of dense / candidate
within one round, so that a change of load between rounds cancels. Times are process CPU time, which background load
disturbs least; wall-clock ratios are recorded beside them. Everything that a mask costs is timed: `ratio_kernel`
includes BlockMask.from_dense, `ratio_with_selection` also mean pooling, block scores, softmax, top-k and the scatter.

    python kernels/benchmarks/block_sparse_attention.py --tokens 2048 4096 --threads 1 2
"""

from __future__ import annotations

import argparse
import csv
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
import torch.nn.functional as F
from dit_accel_kernels import BlockMask, block_sparse_attention
from machine import record
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GATHER_TOKENS = 4096  # gather is timed up to here
CHECKED_ROWS = 128  # queries of each head whose error is measured

Row = dict[str, Any]
Times = tuple[float, float]  # CPU and wall seconds


def select(q: Tensor, k: Tensor, block: int, sparsity: float) -> Tensor:
    """The cheapest usual selection: top-k of the softmax of mean-pooled scores; bool [B, H, n, n]."""
    pooled_q, pooled_k = (x.unflatten(2, (-1, block)).mean(3) for x in (q, k))
    scores = (pooled_q @ pooled_k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(-1)
    kept = max(1, round(scores.shape[-1] * (1 - sparsity)))
    best = scores.topk(kept, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def clocks() -> Times:
    return time.process_time(), time.perf_counter()


def passed(start: Times, end: Times) -> Times:
    return end[0] - start[0], end[1] - start[1]


def timed(call: Callable[[], object]) -> Times:
    start = clocks()
    call()
    return passed(start, clocks())


def timed_sparse(q: Tensor, k: Tensor, v: Tensor, block: int, sparsity: float) -> tuple[Times, Times]:
    """Times of the kernel with its mask conversion, and of these with the selection."""
    start = clocks()
    keep = select(q, k, block, sparsity)
    selected = clocks()
    block_sparse_attention(q, k, v, BlockMask.from_dense(keep, block), impl="cpu")
    end = clocks()
    return passed(selected, end), passed(start, end)


def flex_call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, block: int) -> Callable[[], object]:
    """A call of PyTorch's compiled flex attention with the same blocks; compiles at its first run."""
    from torch.nn.attention.flex_attention import BlockMask as FlexMask
    from torch.nn.attention.flex_attention import flex_attention

    counts = keep.sum(-1, dtype=torch.int32)
    order = keep.int().argsort(dim=-1, descending=True, stable=True).int()
    empty = torch.zeros_like(counts)
    length = keep.shape[-1] * block
    flex_mask = FlexMask.from_kv_blocks(empty, order, counts, order.clone(), block, None, (length, length))
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=flex_mask)


def errors(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> tuple[float, float]:
    """Largest error against float64 over some query rows: of the kernel, and of torch's own with the same mask."""
    rows = torch.linspace(0, q.shape[2] - 1, CHECKED_ROWS).long()
    keep = mask.to_dense()[:, :, rows // mask.block_q].repeat_interleave(mask.block_k, dim=-1)
    exact = F.scaled_dot_product_attention(q[:, :, rows].double(), k.double(), v.double(), attn_mask=keep)
    ours = block_sparse_attention(q, k, v, mask, impl="cpu")
    torchs = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=keep)
    return (ours[:, :, rows] - exact).abs().max().item(), (torchs - exact).abs().max().item()


def measure(tokens: int, dim: int, dtype: str, threads: int, block: int, args: argparse.Namespace) -> Iterator[Row]:
    """One row for each sparsity; all sparsities are timed within the same rounds."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    heads = 2 if tokens < 16384 else 1
    q, k, v = (torch.randn(1, heads, tokens, dim).to(DTYPES[dtype]) for _ in range(3))
    rounds = args.rounds or max(2, min(7, 28672 // tokens))
    masks = {s: BlockMask.from_dense(select(q, k, block, s), block) for s in args.sparsity}
    flex = {s: flex_call(q, k, v, m.to_dense(), block) for s, m in masks.items()} if args.flex else {}
    kernel, selected, gather, flexed = ({s: [] for s in args.sparsity} for _ in range(4))
    dense: list[Times] = []
    warm_up = 1 if tokens < 16384 else 0
    for number in range(rounds + warm_up):
        base = timed(lambda: F.scaled_dot_product_attention(q, k, v))
        if number < warm_up:
            for call in flex.values():
                call()
        else:
            dense.append(base)
        for s in args.sparsity:
            times = timed_sparse(q, k, v, block, s)
            slow = (
                timed(lambda s=s: block_sparse_attention(q, k, v, masks[s], impl="gather"))[0]
                if (s > 0 and tokens <= GATHER_TOKENS)
                else None
            )
            flex_time = timed(flex[s])[0] if flex else None
            if number >= warm_up:
                kernel[s].append(times[0])
                selected[s].append(times[1])
                gather[s].append(slow)
                flexed[s].append(flex_time)
    for s in args.sparsity:
        error_ours, error_sdpa = errors(q, k, v, masks[s])
        yield {
            "tokens": tokens,
            "head_dim": dim,
            "heads": heads,
            "dtype": dtype,
            "threads": threads,
            "block_size": block,
            "sparsity": s,
            "kept": round(masks[s].density, 4),
            "rounds": rounds,
            "sdpa_ms": round(median(t[0] for t in dense) * 1e3, 2),
            "ours_ms": round(median(t[0] for t in selected[s]) * 1e3, 2),
            "ratio_kernel": ratio(dense, kernel[s], 0),
            "ratio_with_selection": ratio(dense, selected[s], 0),
            "wall_ratio_with_selection": ratio(dense, selected[s], 1),
            "gather_ratio": ratio(dense, [(t, t) for t in gather[s] if t], 0),
            "flex_ratio": ratio(dense, [(t, t) for t in flexed[s] if t], 0),
            "max_error_ours": f"{error_ours:.2e}",
            "max_error_sdpa": f"{error_sdpa:.2e}",
        }


def ratio(dense: list[Times], candidate: list[Times], clock: int) -> float | None:
    """Median over rounds of dense / candidate; None where the candidate was not timed."""
    return round(median(d[clock] / c[clock] for d, c in zip(dense, candidate)), 3) if candidate else None


def cases(args: argparse.Namespace) -> Iterator[tuple[int, int, str, int, int]]:
    """(tokens, head size, dtype, threads, block size), short ones first; blocks of 128 at 4096 tokens only."""
    for tokens in args.tokens:
        for block in (64, 128) if tokens == 4096 else (64,):
            for threads in args.threads:
                for dim in args.head_dim:
                    for dtype in args.dtype:
                        yield tokens, dim, dtype, threads, block


def write(folder: Path, rows: list[Row], seconds: float) -> None:
    """`rows` as CSV, and as JSON with all that is needed to judge or repeat them."""
    with (folder / "block_sparse_attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    made = record(seconds, "process CPU time; wall_* are wall clock") | {"rows": rows}
    (folder / "block_sparse_attention.json").write_text(json.dumps(made, indent=1) + "\n")


def draw(folder: Path, rows: list[Row]) -> None:
    """Speed-up with selection over sparsity, one panel for each thread count and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["block_size"] == 64]
    panels = sorted({(row["threads"], row["dtype"]) for row in rows}, key=str)
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (threads, dtype) in zip(axes[0], panels):
        own = [row for row in rows if (row["threads"], row["dtype"]) == (threads, dtype)]
        sparsities = sorted({row["sparsity"] for row in own}, key=float)
        for tokens, dim in sorted({(row["tokens"], row["head_dim"]) for row in own}, key=str):
            line = [row["ratio_with_selection"] for row in own if (row["tokens"], row["head_dim"]) == (tokens, dim)]
            axis.plot(
                sparsities, line, "o-" if dim == 64 else "s--", label=f"{tokens} tokens, head {dim}", markersize=3
            )
        axis.plot(sparsities, [1 / (1 - float(s)) for s in sparsities], "k:", label="1 / (1 - sparsity)")
        axis.axhline(1, color="gray", linewidth=0.5)
        axis.set(title=f"{dtype}, {threads} thread{'s' if threads != 1 else ''}", xlabel="block sparsity", yscale="log")
        axis.set_yticks([1, 2, 4, 8], ["1x", "2x", "4x", "8x"])
    axes[0][0].set_ylabel("dense SDPA time / ours with selection")
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(folder / "block_sparse_attention.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.5, 0.75, 0.9])
    parser.add_argument("--rounds", type=int, help="default: 7 up to 4096 tokens, fewer above")
    parser.add_argument("--flex", action="store_true", help="also time compiled flex attention (minutes of compiling)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows: list[Row] = []
    with torch.no_grad():
        for case in cases(args):
            for row in measure(*case, args):
                rows.append(row)
                print(" ".join(f"{name}={value}" for name, value in row.items() if value is not None), flush=True)
            write(args.out, rows, time.perf_counter() - start)
    draw(args.out, rows)


if __name__ == "__main__":
    main()
