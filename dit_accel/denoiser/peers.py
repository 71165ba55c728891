"""Peers: processes that hold parts of one sequence, and must decide alike although each sees its own part only.

diffusers' context parallelism gives every rank an equal part of the tokens. A gate that went by its own part would
compute on one rank and skip on another, and the collectives inside attention would wait for each other for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from dit_accel.cache.indicator import mean_absolute


@dataclass(frozen=True)
class Peers:
    """group: the processes that share a sequence; `None` for one that has it all."""

    group: Any = None

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor [*] over all ranks, the same bits on each; the tensor itself where there is one."""
        if self.group is None:
            return value
        total = value.clone()
        torch.distributed.all_reduce(total, group=self.group)  # gloo has no mean
        return total / torch.distributed.get_world_size(self.group)

    def mean_absolute(self, x: Tensor) -> Tensor:
        """mean |x| over the elements that all ranks hold, parts x [*] of equal size -> []."""
        return self.mean(mean_absolute(x))

    def relative_l1(self, now: Tensor, reference: Tensor) -> Tensor:
        """As `indicator.relative_l1` of the whole sequence: sums over the ranks are divided, not ratios averaged."""
        return self.mean_absolute(now - reference) / self.mean_absolute(reference)


ALONE = Peers()
