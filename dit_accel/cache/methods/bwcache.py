"""BWCache (2509.13789): when all blocks have changed little on average, the next tenth of the steps reuses them.

The mean over the blocks of the relative L1 of their outputs needs all of them, so it is known only after a computed
step and decides for the following ones. Written from notes on the paper: its code was not available, thresholds for
models other than Open-Sora were not found, nor was a word on guidance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.cache.indicator import relative_l1


@dataclass(frozen=True)
class BwCacheSettings:
    """threshold: of the mean change; reuse: length of a run of skipped steps, as a share of all steps."""

    threshold: float
    reuse: float = 0.1


@dataclass(frozen=True)
class BwCacheState:
    """left: steps of the present run still to be skipped; first_skip: where the first run of all began."""

    left: int = 0
    first_skip: int | None = None


OPEN_SORA = BwCacheSettings(0.15)
OPEN_SORA_MEDIUM = BwCacheSettings(0.20)
OPEN_SORA_FAST = BwCacheSettings(0.25)


def mean_change(now: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """Mean over the blocks of the relative L1 of their outputs, each [B, N, C] -> [].

    before: outputs of the last computed step. After a run that lies several steps back (inferred: what is kept is the
    tensor of that step).
    """
    return torch.stack([relative_l1(a, b) for a, b in zip(now, before, strict=True)]).mean()


def run_length(settings: BwCacheSettings, steps: int) -> int:
    """R: a tenth of the steps, 3 of 30 and 5 of 50. Between such numbers it is rounded, at least to 1 (inferred)."""
    return max(1, round(settings.reuse * steps))


def decide(
    settings: BwCacheSettings, state: BwCacheState, change: float | None, step: int, steps: int
) -> tuple[bool, BwCacheState]:
    """Compute this step? change: `mean_change` of the step before, `None` if that was skipped or has none before it.

    Where the first run began with k steps left, this one included (inferred), the last k / 2 are always computed.
    """
    first_skip = state.first_skip
    if first_skip is not None and steps - step <= (steps - first_skip) / 2:
        return True, BwCacheState(first_skip=first_skip)
    if state.left > 0:
        return False, BwCacheState(state.left - 1, first_skip)
    if change is None or not math.isfinite(change) or change >= settings.threshold:
        return True, BwCacheState(first_skip=first_skip)
    return False, BwCacheState(run_length(settings, steps) - 1, step if first_skip is None else first_skip)
