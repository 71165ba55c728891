"""Sparse speed: what block-sparse attention gains end to end on a Wan-shaped model with random weights, beside what
Amdahl's law says it should.

python -m dit_accel.bench.sparse_speed --tokens 16384 --out docs/results

Prediction: t / (t - a + a / r), t the time of the plain model, a that of its self-attention in it, r by how much the
kernel with its search beats dense attention on the same queries and keys. Dense and sparse take turns in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import dit_accel
from dit_accel import BlockSparse, Policy
from dit_accel.attention.attend import attend
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.bench.results import versions
from dit_accel.files import write_atomically


class _Timed(TorchFunctionMode):
    """Adds up the time of self-attention, and keeps the arguments of its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.first: tuple[Tensor, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        tensors = tuple(args[:3]) if len(args) >= 3 else tuple(kwargs[name] for name in ("query", "key", "value"))
        if tensors[0].shape != tensors[1].shape:
            return func(*args, **kwargs)
        self.first = self.first or tensors
        started = time.process_time()
        result = func(*args, **kwargs)
        self.seconds += time.process_time() - started
        return result


def timed(call: Callable[[], Any]) -> float:
    """Seconds of CPU that a call takes: other programs on the machine do not count."""
    started = time.process_time()
    call()
    return time.process_time() - started


def measure(tokens: int, heads: int, dim: int, layers: int, density: float, rounds: int) -> dict[str, float]:
    """One row: measured and predicted speed-up, medians over rounds."""
    frames = max(1, tokens // 1024)
    grid = TokenGrid(frames, 32, 32)
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=dim,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        ffn_dim=4 * heads * dim,
        num_layers=layers,
    ).eval()
    latents, text = torch.randn(1, 16, frames, 64, 64), torch.randn(1, 32, 64)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(hidden_states=latents, timestep=torch.tensor([500.0]), encoder_hidden_states=text)[0]

    settings = BlockSparse(density, dense_steps=0.0, keep=())
    layout = layout_of(grid, settings.order, settings.tile, settings.block_size)
    watch = _Timed()
    with watch:
        forward()
    query, key, value = watch.first
    scale = query.shape[-1] ** -0.5
    plain, share, sparse, ratio = [], [], [], []
    with dit_accel.apply(model, Policy(attention=settings)) as session:
        with session.run(steps=1):
            forward()  # compiles the kernel, counts FLOPs
        for _ in range(rounds):
            with _Timed() as mode:
                plain.append(timed(forward))  # outside a run the model is plain
            share.append(mode.seconds / plain[-1])
            with session.run(steps=1):
                sparse.append(timed(forward))
            dense = timed(lambda: scaled_dot_product_attention(query, key, value, scale=scale))
            kernel = timed(lambda: attend(settings, layout, query, key, value, scale=scale, step=0))
            ratio.append(dense / kernel)
    speed = statistics.median(one / other for one, other in zip(plain, sparse))
    predicted = statistics.median(1 / (1 - a + a / r) for a, r in zip(share, ratio))
    return {
        "tokens": grid.tokens,
        "density": density,
        "plain_seconds": statistics.median(plain),
        "attention_share": statistics.median(share),
        "attention_ratio": statistics.median(ratio),
        "speed_up": speed,
        "predicted": predicted,
        "measured_over_predicted": speed / predicted,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="a multiple of 1024")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = []
    for density in arguments.densities:
        rows.append(
            measure(arguments.tokens, arguments.heads, arguments.dim, arguments.layers, density, arguments.rounds)
        )
        print({name: round(value, 3) for name, value in rows[-1].items()})
    about = {
        "command": "python -m dit_accel.bench.sparse_speed",
        "settings": {k: v for k, v in vars(arguments).items() if k != "out"},
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomically(
        arguments.out / f"sparse-speed-{arguments.threads}-threads.json",
        json.dumps(about, indent=2, default=str) + "\n",
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
