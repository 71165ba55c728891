"""FLOPs of a denoiser, counted with torch's own formulas in the first observed forward of each input shape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import dit_accel_kernels  # registers the formulas of its operators
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dit_accel.diffusers_bridge import hides_from_counters
from dit_accel.stats import COMPUTE, PARTLY, RECOMPUTE, SYMBOLS


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of dense attention on query, key and value [B, H, S, D]: two products, two FLOPs a multiply-add."""
    batch, heads, rows, width = query.shape
    return 2 * batch * heads * rows * key.shape[2] * (width + value.shape[3])


# torch 2.13 has formulas for CUDA's attention kernels, but none for the one that runs on a CPU.
assert dit_accel_kernels
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
}


class _Counter(TorchDispatchMode):
    """Adds up FLOPs of the operators that pass. torch's FlopCounterMode also tracks modules with autograd hooks, which
    breaks models that switch gradients on inside their forward (BriaFibo2)."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None:
            with self:  # under inference mode, composite operators such as linear arrive whole
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        self.total += int(formula(*args, **kwargs, out_val=result))
        return result


def counting() -> _Counter:
    """A context that counts the FLOPs of torch's operators inside, in `total`; an outer counter does not see these."""
    return _Counter()


class FlopMeter:
    """Counts once a shape, and then answers from the table. source: "measured" or "parameters"."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.tables: dict[Any, tuple[int, tuple[int, ...]]] = {}  # key -> FLOPs of the forward, and of each block call
        self.layers: dict[Any, Mapping[tuple[int, str], int]] = {}  # key -> FLOPs of the layers inside blocks
        self.first_layers: Mapping[tuple[int, str], int] = {}  # (block, name) -> the same, of the first shape
        self.searches: dict[Any, int] = {}  # kind of attention call -> FLOPs of choosing its blocks
        self.source = "parameters" if hides_from_counters(module) else "measured"
        self._counter: _Counter | None = None
        self._total = 0

    def read(self) -> int:
        """FLOPs counted so far in this forward."""
        return self._counter.total if self._counter is not None else 0

    @contextlib.contextmanager
    def counted_as(self, flops: int) -> Iterator[None]:
        """Count what runs inside as so many FLOPs: the table is of the plain model."""
        before = self.read()
        yield
        if self._counter is not None:
            self._counter.total = before + flops

    @contextlib.contextmanager
    def measuring(self, key: Any) -> Iterator[None]:
        """Count the forward inside, unless this shape is known or compiled code would hide from the counter."""
        if key in self.tables:  # every run observes; only the first of a shape has to look through the modules
            yield
            return
        self.source = "parameters" if hides_from_counters(self.module) else "measured"
        if self.source == "parameters":
            yield
            return
        self._counter = _Counter()
        try:
            with self._counter:
                yield
            self._total = self._counter.total
        finally:
            self._counter = None

    def keep(
        self, key: Any, flops: Sequence[int], numbers: Sequence[int], blocks: Sequence[tuple[nn.Module, str]]
    ) -> None:
        """Remember what was counted; a model that hides from the counter is weighed by its parameters instead."""
        if key in self.tables:
            return
        if self.source == "parameters":
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
        ran = (SYMBOLS[COMPUTE], SYMBOLS[RECOMPUTE], SYMBOLS[PARTLY])
        return total - sum(f for f, symbol in zip(flops, symbols) if symbol not in ran), total

    def without_layers(self, key: Any, skipped: Sequence[tuple[int, str]]) -> tuple[int, int]:
        """FLOPs made and FLOPs of the plain forward, for a call in which these layers did not run."""
        total, _ = self.tables.get(key, (0, ()))
        return total - sum(self.layers.get(key, {}).get(layer, 0) for layer in skipped), total

    def share(self, whole: Any, part: Any, samples: int) -> None:
        """What was counted for a batch, for one of its samples."""
        total, flops = self.tables[whole]
        self.tables[part] = (total // samples, tuple(count // samples for count in flops))
        self.layers[part] = {layer: count // samples for layer, count in self.layers.get(whole, {}).items()}
