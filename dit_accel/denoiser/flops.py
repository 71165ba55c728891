"""FLOPs of a denoiser, counted by torch's own counter in the first observed forward of each input shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dit_accel.diffusers_bridge import is_compiled
from dit_accel.stats import COMPUTE, RECOMPUTE, SYMBOLS


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of dense attention from the shapes [B, H, S, D] of query, key and value: two products, 2 FLOPs a step."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


# The counter knows CUDA's attention kernels, but not the one that runs on a CPU (torch 2.13).
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


class FlopMeter:
    """Counts once a shape, and then answers from the table. source: "measured" or "parameters"."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.tables: dict[Any, tuple[int, tuple[int, ...]]] = {}  # key -> FLOPs of the forward, and of each block call
        self.source = "measured"
        self._counter: FlopCounterMode | None = None
        self._total = 0

    def read(self) -> int:
        """FLOPs counted so far in this forward."""
        return self._counter.get_total_flops() if self._counter is not None else 0

    @contextlib.contextmanager
    def measuring(self, key: Any) -> Iterator[None]:
        """Count the forward inside, unless this shape is known or compiled code would hide from the counter."""
        if key in self.tables or is_compiled(self.module):
            yield
            return
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as self._counter:
            try:
                yield
                self._total = self.read()
            finally:
                self._counter = None

    def keep(
        self, key: Any, flops: Sequence[int], numbers: Sequence[int], blocks: Sequence[tuple[nn.Module, str]]
    ) -> None:
        """Remember what was counted; compiled models are weighed by their parameters instead."""
        if key in self.tables:
            return
        if is_compiled(self.module):
            self.source = "parameters"
            sizes = [sum(p.numel() for p in block.parameters()) for block, _ in blocks]
            flops = [sizes[number] for number in numbers]
            self._total = sum(p.numel() for p in self.module.parameters())
        self.tables[key] = (max(self._total, sum(flops)), tuple(flops))

    def of(self, key: Any, symbols: str) -> tuple[int, int]:
        """FLOPs made and FLOPs of the plain forward, for a call with these block symbols."""
        if key not in self.tables:
            return 0, 0
        total, flops = self.tables[key]
        if len(flops) != len(symbols):
            return total, total
        ran = (SYMBOLS[COMPUTE], SYMBOLS[RECOMPUTE])
        return total - sum(f for f, symbol in zip(flops, symbols) if symbol not in ran), total
