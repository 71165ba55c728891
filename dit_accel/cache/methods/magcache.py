"""MagCache (arXiv 2506.09045): skip while the magnitude ratios of the residual, multiplied up, stay close to 1.

gamma_i = mean over tokens of ||r_i||_2 / ||r_{i-1}||_2 comes from one calibration run. Since the last computed step
R = prod gamma and E = sum |1 - R|; a step is skipped while E < threshold and at most `max_skips` are in a row.
Reused is the residual of the whole stack, as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.methods.mask import check_budget
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.signal import Signal
from dit_accel.errors import PolicyError

# FLUX.1-dev, 28 steps, from the authors.
FLUX_RATIOS = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359),
    0.89062,
)

# (threshold, longest run, retention). The retention of HunyuanVideo, Wan2.2 and Qwen-Image was not found; theirs is the
# default of diffusers here. On FLUX the authors also compute the step that lies where step 11 of 28 does.
PUBLISHED = {
    "diffusers": (0.06, 3, 0.2),
    "flux": (0.24, 5, 0.1),
    "wan2.1-14b": (0.24, 6, 0.2),
    "wan2.1-1.3b": (0.12, 2, 0.2),
    "wan2.1-1.3b-fast": (0.12, 4, 0.2),
    "hunyuan-video": (0.12, 4, 0.2),
    "hunyuan-video-fast": (0.24, 6, 0.2),
    "wan2.2": (0.06, 2, 0.2),
    "qwen-image": (0.06, 2, 0.2),
}


def cache(
    threshold: float = 0.06, max_skips: int = 3, retention: float = 0.2, ratios: tuple[float, ...] | None = None
) -> BlockCache:
    """threshold: largest sum E of |1 - R|; max_skips: K, the longest run of skips; retention: share of the run that is
    computed at its start; ratios: of a calibration, stretched to the run; without them the first run measures its
    own."""
    return BlockCache(
        threshold,
        accumulate=True,
        warmup=1,
        tail=0,
        max_skips=max_skips,
        probe_blocks=0,
        signal=Signal("ratios", ratios=ratios),
        schedule=Schedule(retention=retention),
    )


def magnitude_ratios(residuals: Tensor) -> list[float]:
    """gamma [T] from the residuals of a full run [T, ..., channels]; the first is 1, it has nothing before it."""
    norms = torch.linalg.vector_norm(residuals.double(), dim=-1).flatten(start_dim=1)  # [T, tokens]
    return [1.0, *(norms[1:] / norms[:-1]).mean(dim=1).tolist()]


def nearest_ratios(ratios: Sequence[float], steps: int) -> list[float]:
    """A table of ratios stretched or shrunk to another number of steps [steps], each from the nearest place in the run.

    As published: the ratios are not adapted to the new distance between steps.
    """
    check_budget(1, steps)
    if not ratios:
        raise PolicyError("The table of MagCache ratios is empty; calibrate, or give a published one.")
    if steps == 1:
        return [ratios[-1]]
    scale = (len(ratios) - 1) / (steps - 1)
    return [ratios[round(step * scale)] for step in range(steps)]


def drift(ratios: Sequence[float], step: int, skips: int) -> float | None:
    """|1 - R| at a step that would be the (skips + 1)-th in a row: R multiplies the ratios since the last computed one.

    `None` where there is no table, or the run is longer than it.
    """
    if not ratios or step >= len(ratios):
        return None
    return abs(1.0 - math.prod(ratios[step - skips : step + 1]))
