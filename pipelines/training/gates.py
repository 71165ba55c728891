"""Gates: teach SeerAttention's gates the attention of a trained pipeline, by self-distillation, in minutes.

python pipelines/training/gates.py pipelines/tiny-flux --out pipelines/gates/tiny-flux.safetensors
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import dit_accel
from dit_accel import BlockSparse, Policy
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.seer import Gate, distil, save_gates
from dit_accel.attention.route import AttentionEvent
from dit_accel.bench.measure import load_workload

Sample = tuple[str, Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--items", type=int, default=4, help="prompts that are sampled, from the end of prompts.txt")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--every", type=int, default=7, help="steps between two samples of a layer")
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    started = time.perf_counter()
    workload = load_workload(arguments.pipeline, arguments.steps)
    # Every other prompt is measured by the bench, which begins at the front.
    items = range(len(workload.prompts) - arguments.items, len(workload.prompts))
    dense = BlockSparse(block_size=arguments.block_size, min_tokens=0, dense_steps=1.0)  # looks on, changes nothing
    samples: list[Sample] = []

    def keep(event: AttentionEvent) -> None:
        if event.grid is None or event.step % arguments.every:
            return
        layout = layout_of(event.grid, dense.order, dense.tile, dense.block_size)
        samples.append((event.layer, event.query[:, :, layout.permutation], event.key[:, :, layout.permutation]))

    with dit_accel.apply(workload.pipe, Policy(attention=dense)) as session:
        session.on_attention(keep)
        for item in items:
            workload.image(item, workload.steps)
    torch.manual_seed(0)
    shapes = {layer: query.shape for layer, query, _ in samples}
    gates = {layer: Gate(shape[1], shape[3], width=16) for layer, shape in shapes.items()}
    losses = distil(gates, samples, block_size=arguments.block_size, passes=arguments.passes)
    save_gates(gates, arguments.out)
    print(
        f"{len(gates)} gates, {len(samples)} samples, {time.perf_counter() - started:.0f} s; divergence from the true "
        f"attention {losses[0]:.3f} -> {losses[-1]:.3f} nats"
    )


if __name__ == "__main__":
    main()
