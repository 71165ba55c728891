"""Times the Triton kernels on a CUDA device: attention against `F.scaled_dot_product_attention`, vq_linear against
`F.linear`; writes JSON.

    python kernels/benchmarks/gpu.py --out docs/results/gpu-kernels.json

Medians of many calls by CUDA events (triton.testing.do_bench); what the host needs to start a kernel is in them where
the device is done before. Errors are relative L2 distances to float32 on the same inputs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from block_sparse_attention import select
from dit_accel_kernels import BlockMask, block_sparse_attention, vq_linear
from machine import record
from torch import Tensor
from vq_linear import quantised

Row = dict[str, Any]
DENSITIES = (0.5, 0.25, 0.1)
SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288), (18432, 3072))  # of FLUX.1, the last of its modulation


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call."""
    from triton.testing import do_bench

    taken: Any = do_bench(call, warmup=10, rep=40, return_mode="median")
    return float(taken)


def apart(found: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    return float((found.float() - exact).norm() / exact.norm())


def sparse(q: Tensor, k: Tensor, v: Tensor, block: int, density: float) -> Tensor:
    """Selection, mask and kernel: all that a call costs."""
    return block_sparse_attention(q, k, v, BlockMask.from_dense(select(q, k, block, 1 - density), block))


def attention(heads: int = 12, dim: int = 128) -> Iterator[Row]:
    """bfloat16, one sample; blocks of 64 and 128."""
    for tokens in (4096, 8192, 16384, 32768, 32760):  # the last is Wan's 81 frames at 480p, which fills no whole block
        q, k, v = (torch.randn(1, heads, tokens, dim, device="cuda").bfloat16() for _ in range(3))
        dense = milliseconds(partial(F.scaled_dot_product_attention, q, k, v))
        for block in (64, 128):
            count = -(-tokens // block)
            for density in DENSITIES:
                chosen = torch.rand(1, heads, count, count, device="cuda").argsort(-1) < round(count * density)
                mask = BlockMask.from_dense(chosen, block)
                kernel = milliseconds(partial(block_sparse_attention, q, k, v, mask, impl="triton"))
                row: Row = {"tokens": tokens, "block": block, "density": round(mask.density, 4)}
                row |= {"dense_ms": round(dense, 3), "kernel_ms": round(kernel, 3)}
                row["tflops"] = round(4 * tokens**2 * dim * heads * mask.density / kernel / 1e9)
                row["ratio_kernel"] = round(dense / kernel, 2)
                if tokens % block == 0:
                    row["ratio_with_selection"] = round(
                        dense / milliseconds(partial(sparse, q, k, v, block, density)), 2
                    )
                rows = slice(0, block)  # the first block of queries, against float32
                kept = chosen[:, :, :1].repeat_interleave(block, -1)[..., :tokens]
                exact = F.scaled_dot_product_attention(
                    q[:, :, rows].float(), k.float(), v.float(), attn_mask=kept.expand(-1, -1, block, -1)
                )
                row["apart"] = round(apart(block_sparse_attention(q, k, v, mask, impl="triton")[:, :, rows], exact), 5)
                yield row


def weights() -> Iterator[Row]:
    """bfloat16; rotation of x in blocks of 1024 is part of a call."""
    for outputs, inputs in SHAPES:
        dense = torch.randn(outputs, inputs, device="cuda").bfloat16()
        for tokens in (1, 8, 16, 64, 256, 1024, 4096) if outputs != 18432 else (1, 2):
            x = torch.randn(tokens, inputs, device="cuda").bfloat16()
            base = milliseconds(partial(F.linear, x, dense))
            for bits in (2, 3, 4):
                weight: dict[str, Any] = {
                    key: value.cuda() if isinstance(value, Tensor) else value
                    for key, value in quantised(outputs, inputs, bits).items()
                }
                exact = vq_linear(x.float(), **weight, impl="reference")
                taken = milliseconds(partial(vq_linear, x, **weight))
                row: Row = {"outputs": outputs, "inputs": inputs, "tokens": tokens, "bits": bits}
                row |= {"dense_ms": round(base, 4), "vq_ms": round(taken, 4), "ratio": round(taken / base, 2)}
                yield row | {"apart": round(apart(vq_linear(x, **weight), exact), 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    start = time.perf_counter()
    report: dict[str, Any] = {}
    torch.manual_seed(0)
    with torch.inference_mode():
        for name, part in (("attention", attention), ("weights", weights)):
            report[name] = []
            for row in part():
                report[name].append(row)
                print(name, " ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    made = record(time.perf_counter() - start, "CUDA events") | {"device": torch.cuda.get_device_name()} | report
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
