"""Measure: cost and quality of one method on one workload.

Cost is the share of the blocks' FLOPs that was really executed, counted on a leaf inside every block (a hook on the
block itself also fires when a cache skips its body). Quality is PSNR against the plain pipeline at full steps with the
same seed, one image a call, from tensors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dit_accel
from dit_accel import BlockCache, Policy
from dit_accel.bench.methods import Method
from dit_accel.denoiser.find import find_block_lists
from dit_accel.quality import bootstrap_interval, psnr


@dataclass(frozen=True)
class Result:
    """One row of the table: cost, and PSNR in dB: mean, its 95 % interval, worst and its item."""

    family: str
    setting: str
    guidance: float
    share: float
    psnr_mean: float
    psnr_low: float
    psnr_high: float
    psnr_worst: float
    worst_item: int


class WorkCounter:
    """Counts executed blocks by a hook on the first linear layer in each. shares: FLOPs of each block / of all."""

    def __init__(self, transformer: nn.Module, shares: Sequence[float]):
        self.done = 0.0
        self.handles = []
        blocks = [block for blocks in find_block_lists(transformer).values() for block in blocks]
        for block, share in zip(blocks, shares, strict=True):
            leaf = next(m for m in block.modules() if isinstance(m, nn.Linear))
            self.handles.append(leaf.register_forward_hook(lambda *_, share=share: self._add(share)))

    def _add(self, share: float) -> None:
        self.done += share

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass
class Workload:
    """What is rendered: one prompt and seed an item."""

    pipe: Any
    prompts: Sequence[str]
    arguments: dict[str, Any]
    steps: int
    guidance: float

    @functools.cached_property
    def block_shares(self) -> list[float]:
        """FLOPs of each block / FLOPs of all, counted in one forward."""
        with dit_accel.apply(self.pipe, Policy(BlockCache(threshold=None, max_skips=1))) as session:
            self.image(0, 8)
            meter = session.denoisers["transformer"].meter
            _, flops = next(iter(meter.tables.values()))
        return [one / sum(flops) for one in flops]

    def image(self, item: int, steps: int) -> Tensor:
        """-> [1, C, H, W] in [0, 1]."""
        return self.pipe(
            prompt=self.prompts[item],
            true_cfg_scale=self.guidance,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(item),
            output_type="pt",
            **self.arguments,
        ).images

    def measure(self, method: Method, reference: Sequence[Tensor]) -> Result:
        """All items under one method."""
        steps = method.steps or self.steps
        values, counter = [], WorkCounter(self.pipe.transformer, self.block_shares)
        detach = method.attach(self.pipe)
        try:
            for item, expected in enumerate(reference):
                values.append(float(psnr(self.image(item, steps), expected)[0]))
        finally:
            detach()
            counter.remove()
        calls = len(reference) * self.steps * (2 if self.guidance > 1 else 1)
        finite = [v for v in values if np.isfinite(v)]
        low, high = bootstrap_interval(torch.tensor(finite or [float("nan")]))
        worst = int(np.argmin(values))
        mean = float(np.mean(finite)) if finite else float("inf")
        share = counter.done / calls
        row = (method.family, method.setting, self.guidance, share, mean, low, high, values[worst], worst)
        return Result(*row)


def magnitude_ratios(workload: Workload, items: int = 4) -> Tensor:
    """MagCache's calibration [steps]: mean over tokens of |r_i| / |r_{i-1}|, r the residual of the whole stack."""
    blocks = [block for blocks in find_block_lists(workload.pipe.transformer).values() for block in blocks]
    norms: list[Tensor] = []
    inputs: list[Tensor] = []

    def before(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        inputs.append(kwargs["hidden_states"].clone())

    def after(_: Any, __: Any, result: Any) -> None:
        norms.append((result[1] - inputs.pop()).norm(dim=-1))

    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True), blocks[-1].register_forward_hook(after)]
    ratios = []
    try:
        for item in range(min(items, len(workload.prompts))):
            norms.clear()
            workload.image(item, workload.steps)
            stride = len(norms) // workload.steps
            one = norms[::stride]
            ratios.append(torch.stack([torch.ones(()), *[(b / a).mean() for a, b in itertools.pairwise(one)]]))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(ratios).mean(0)
