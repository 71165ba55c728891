"""Measure: cost and quality of one method on one workload, for any pipeline.

Cost is the FLOPs of the blocks that were really executed over those of the plain pipeline, counted on a leaf inside
every block (a hook on the block itself also fires when a cache skips its body). Quality is PSNR against the plain
pipeline at full steps with the same seed, one item a call, from tensors; of a video the mean over its frames.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dit_accel
from dit_accel import BlockCache, Policy
from dit_accel.bench.methods import Method
from dit_accel.cache import Schedule, Scope
from dit_accel.calls import Caller
from dit_accel.cli import call_defaults, load_pipeline
from dit_accel.denoiser.find import find_block_lists, find_denoisers
from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.quality import psnr, summarize


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


@dataclass(frozen=True)
class Block:
    """A part of a denoiser: a layer of a block, or the rest of it. leaf: path of a leaf that runs whenever it does."""

    denoiser: str
    leaf: str
    flops: float


class WorkCounter:
    """Adds up the FLOPs of the blocks that run. calls: of the first block of each denoiser."""

    def __init__(self, denoisers: Mapping[str, nn.Module], blocks: Sequence[Block]):
        self.flops, self.calls = 0.0, 0
        self.handles = []
        known: set[str] = set()
        for block in blocks:
            leaf = denoisers[block.denoiser].get_submodule(block.leaf)
            add = functools.partial(self._add, block.flops, block.denoiser not in known)
            self.handles.append(leaf.register_forward_hook(lambda *_, add=add: add()))
            known.add(block.denoiser)

    def _add(self, flops: float, is_first: bool) -> None:
        self.flops += flops
        self.calls += is_first

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def find_blocks(
    name: str,
    denoiser: nn.Module,
    flops: Sequence[int],
    ran: Sequence[nn.Module],
    layers: Mapping[nn.Module, int] | None = None,
) -> list[Block]:
    """The blocks of a denoiser, and their layers. flops: of each block call of its first forward; ran: every block and
    linear layer that ran, one after another; layers: FLOPs of the attention and MLPs inside blocks, counted apart.

    The leaf is the first linear layer that ran as often as its block; DiT also uses one of its first block by itself.
    """
    paths = {module: path for path, module in denoiser.named_modules()}
    counts = Counter(ran)
    blocks = {block: 0.0 for blocks in find_block_lists(denoiser).values() for block in blocks}
    calls = [module for module in ran if module in blocks]
    for block, cost in zip(calls, flops):
        blocks[block] += cost
    found = []
    for block, cost in blocks.items():
        own = {layer: count for layer in block.children() if (count := (layers or {}).get(layer, 0))}
        inside = {module for layer in own for module in layer.modules()}
        parts = [(block, cost - sum(own.values()), lambda m, inside=inside: m not in inside)]
        parts += [(layer, float(count), lambda m: True) for layer, count in own.items()]
        for part, share, counts_here in parts:
            leaves = [m for m in part.modules() if isinstance(m, nn.Linear) and counts[m] == counts[block]]
            leaf = next(filter(counts_here, leaves), None)
            if leaf is not None:
                found.append(Block(name, paths[leaf], share))
            elif share > 0.0:
                raise UnsupportedModelError(
                    f"{paths[part]} of {name} has no linear layer of its own that tells when it runs"
                )
    return found


class Workload:
    """What is rendered: one prompt and seed an item. arguments: of the call, guidance among them."""

    def __init__(self, pipe: Any, prompts: Sequence[str | None], arguments: dict[str, Any], steps: int):
        self.pipe, self.prompts, self.steps = pipe, prompts, steps
        self.caller = Caller(pipe, arguments)
        self.caller.check(prompts)

    @property
    def guidance(self) -> float:
        """Strength of classifier-free guidance; 1 is none."""
        name = self.caller.guidance
        if name is None:
            return 1.0
        return float(self.caller.arguments.get(name, self.caller.parameters[name].default))

    def image(self, item: int, steps: int) -> Tensor:
        """-> images [N, C, H, W] or videos [N, F, C, H, W] in [0, 1]."""
        return self.caller.make(self.prompts[item], item, steps).pictures

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """Every block of every denoiser and the layers in it, with their FLOPs, found in one run."""
        try:
            return self._blocks(Scope("layers"))
        except UnsupportedModelError:  # no layers that can be told apart
            return self._blocks(Scope())

    def _blocks(self, scope: Scope) -> list[Block]:
        denoisers = find_denoisers(self.pipe)
        ran: dict[str, list[nn.Module]] = {name: [] for name in denoisers}
        computed = Schedule(mask="1")  # every step is: what is counted is a plain forward
        policy = Policy(BlockCache(threshold=None, scope=scope, schedule=computed))
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(dit_accel.apply(self.pipe, policy))
            for name, denoiser in denoisers.items():
                blocks = [block for blocks in find_block_lists(denoiser).values() for block in blocks]
                for module in (*blocks, *(m for block in blocks for m in block.modules() if isinstance(m, nn.Linear))):
                    handle = module.register_forward_hook(lambda m, *_, name=name: ran[name].append(m))
                    stack.callback(handle.remove)
            self.image(0, self.steps)
            found: list[Block] = []
            for name, denoiser in denoisers.items():
                attached = session.denoisers[name]
                _, flops = next(iter(attached.meter.tables.values()), (0, ()))
                found += find_blocks(name, denoiser, flops, ran[name], attached.layer_flops())
        return found

    @functools.cached_property
    def _plain(self) -> tuple[list[Tensor], float, int]:
        """Pictures, FLOPs and denoiser calls of all items, plain, at full steps."""
        with self._counting() as counter:
            pictures = [self.image(item, self.steps) for item in range(len(self.prompts))]
        return pictures, counter.flops, counter.calls

    @property
    def reference(self) -> list[Tensor]:
        """Every item, plain, at full steps."""
        return self._plain[0]

    @property
    def branches(self) -> bool:
        """True where a step calls its denoiser more than once, because guidance is not done in one batch."""
        return self._plain[2] > 1.5 * len(self.prompts) * self.steps

    @contextlib.contextmanager
    def _counting(self) -> Iterator[WorkCounter]:
        counter = WorkCounter(find_denoisers(self.pipe), self.blocks)
        try:
            yield counter
        finally:
            counter.remove()

    def measure(self, method: Method) -> Result:
        """All items under one method. Raises whatever the method raises on a pipeline that it does not support."""
        reference, flops, _ = self._plain
        values = []
        with self._counting() as counter:
            detach = method.attach(self.pipe)
            try:
                for item, expected in enumerate(reference):
                    made = self.image(item, method.steps or self.steps)
                    values.append(summarize(psnr(made.flatten(0, -4), expected.flatten(0, -4))).mean)
            finally:
                detach()
        share = counter.flops / flops
        level = summarize(values)
        row = (method.family, method.setting, self.guidance, share, level.mean, level.low, level.high, level.worst)
        return Result(*row, level.worst_index)


def load_workload(
    folder: Path, steps: int, guidance: float | None = None, items: int | None = None, prompts: Path | None = None
) -> Workload:
    """Workload of a pipeline folder, with its prompts.txt and its call defaults unless others are given."""
    pipe = load_pipeline(folder)
    for name, module in find_denoisers(pipe).items():
        # Kernels round by where weights lie in memory: so all of them are copies, as those that methods are given.
        setattr(pipe, name, copy.deepcopy(module))
    arguments = call_defaults(folder)
    name = Caller(pipe).guidance
    if guidance is not None and name is not None:
        arguments[name] = guidance
    elif guidance not in (None, 1):
        raise ArgumentError(f"{type(pipe).__name__} takes no guidance, so {guidance:g} is not possible; leave it out.")
    return Workload(pipe, (prompts or folder / "prompts.txt").read_text().splitlines()[:items], arguments, steps)


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples and lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(value)


def carrier(values: Any) -> Tensor:
    """The tensor [B, S, D] that carries the picture: the largest, since there are more image than text tokens."""
    return max(tensors(values), key=Tensor.numel)


def magnitude_ratios(workload: Workload, items: int = 4) -> Tensor:
    """MagCache's calibration [steps]: mean over tokens of |r_i| / |r_{i-1}|, r the residual of the whole stack.

    Raises UnsupportedModelError where no such residual can be seen.
    """
    denoisers = list(find_denoisers(workload.pipe).values())
    if len(denoisers) > 1:
        raise UnsupportedModelError("one list of ratios cannot serve two denoisers")
    blocks = [block for blocks in find_block_lists(denoisers[0]).values() for block in blocks]
    norms: list[Tensor] = []
    inputs: list[list[Tensor]] = []

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inputs[:] = [[value.clone() for value in tensors([*args, *kwargs.values()])]]

    def after(_: Any, __: Any, result: Any) -> None:
        picture = carrier([result])
        same = [value for value in inputs[0] if value.shape == picture.shape]
        if not same:
            raise UnsupportedModelError("the first block takes nothing of the shape that the last one returns")
        norms.append((picture - same[0]).norm(dim=-1))

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
