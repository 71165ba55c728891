"""SmoothCache (arXiv 2411.10510): one static schedule per kind of module, from errors measured in a calibration run.

The error of kind k is the mean over blocks of ||o_i - o_{i+j}||_1 / ||o_{i+j}||_1: how far the output of step i is from
that of step i + j, which would reuse it. All blocks of a kind share one schedule; reused is the module's output before
its gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.methods.mask import Mask, check_budget, mask_of
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope
from dit_accel.errors import PolicyError

LOOKBACK = 3  # longest run of skipped steps that the authors calibrate

# (steps, alpha) of the schedules that the authors ship.
PUBLISHED_ALPHAS = ((50, 0.08), (50, 0.18), (30, 0.35), (70, 0.08))

ErrorTable = Sequence[Sequence[float]]


@dataclass(frozen=True)
class SmoothCache:
    """alpha: skip where the error is at most this; larger is faster, less exact (useful: 0.08 to 0.35; 0 never skips).

    The default is that of the faster of the authors' two schedules for DiT at 50 steps.
    """

    alpha: float = 0.18

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < float("inf"):
            raise PolicyError(f"SmoothCache.alpha is {self.alpha}; give a finite number of at least 0.")


def error_table(outputs: Mapping[str, Tensor], lookback: int = LOOKBACK) -> list[list[float]]:
    """Errors of one kind of module: row j - 1, [T - j], has at i the mean over blocks of the change from i to i + j.

    outputs: block name -> what the module of this kind gave at each step of a full run, [T, ...].
    """
    if not outputs or lookback < 1:
        raise PolicyError(
            f"SmoothCache got {len(outputs)} blocks and a look-back of {lookback}; give at least one of each."
        )
    lengths = {len(recorded) for recorded in outputs.values()}
    if len(lengths) > 1:
        raise PolicyError(
            f"SmoothCache got blocks recorded over {sorted(lengths)} steps; record all over the same steps."
        )
    steps = lengths.pop()
    table: list[list[float]] = []
    for j in range(1, min(lookback, steps - 1) + 1):
        rows = [_changes(recorded, j) for recorded in outputs.values()]
        table.append(torch.stack(rows).mean(dim=0).tolist())
    return table


def kind_mask(settings: SmoothCache, errors: ErrorTable, steps: int) -> Mask:
    """Mask [steps] of one kind: from a computed step i, skip the largest j steps whose error is at most alpha.

    errors: [lookback][T - j] as `error_table` gives it. The first and the last step are always computed.
    """
    check_budget(1, steps)
    if any(len(row) != steps - j for j, row in enumerate(errors, start=1)):
        raise PolicyError(
            f"The rows of the SmoothCache errors have {[len(row) for row in errors]} entries for {steps} steps; "
            f"row j has to have {steps} - j. Calibrate with as many steps as the run has."
        )
    computed = {0, steps - 1}
    step = 0
    while step < steps:
        computed.add(step)
        step += 1 + _skips(settings, errors, step)
    return mask_of(computed, steps)


def schedule(settings: SmoothCache, errors: Mapping[str, ErrorTable], steps: int) -> dict[str, Mask]:
    """Kind of module (attention, feed-forward, ...) -> its mask [steps]."""
    return {kind: kind_mask(settings, table, steps) for kind, table in errors.items()}


def _changes(recorded: Tensor, j: int) -> Tensor:
    """[T - j]: relative L1 between each step of [T, ...] and the one j later, which is the reference."""
    flat = recorded.flatten(start_dim=1).double()
    return (flat[:-j] - flat[j:]).abs().sum(dim=1) / flat[j:].abs().sum(dim=1)


def _skips(settings: SmoothCache, errors: ErrorTable, step: int) -> int:
    # As in the authors' code, only the error of the longest reuse is asked for, not those of the steps before it.
    # Their code skips at alpha 0 too where an output does not change at all; here 0 never skips. A nan computes.
    for j in range(len(errors), 0, -1):
        if settings.alpha > 0 and step < len(errors[j - 1]) and errors[j - 1][step] <= settings.alpha:
            return j
    return 0


def cache(alpha: float = 0.18) -> BlockCache:
    """The first run computes everything and measures; later ones go by its masks, one for each kind of layer."""
    return BlockCache(
        None,
        warmup=1,
        tail=1,
        max_skips=None,  # the masks of the kinds hold the look-back, each for itself
        probe_blocks=0,
        scope=Scope("layers"),
        schedule=Schedule(calibrate="smoothcache", budget=alpha),
    )
