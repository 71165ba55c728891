"""EasyCache (2507.02860): the change of the latent, times a rate measured when computing, foretells that of the output.

The model is seen from outside: input x and output y alone. Reused on skipped steps: y - x of the last computed one.
Guidance: the conditional branch decides, and the other follows with a residual of its own.
"""

from __future__ import annotations

from torch import Tensor

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.indicator import mean_absolute
from dit_accel.cache.scope import Scope
from dit_accel.cache.signal import Signal

# (threshold, first). The authors of Wan's give 0.1 for about 2 times as fast and 0.2 for 3 times.
PUBLISHED = {"wan2.1": (0.05, 10), "hunyuan-video": (0.025, 5)}
# NVIDIA Sol-Engine's choices; how many first steps it computes is not known here.
SOL_ENGINE_THRESHOLDS = {"sana-video": 0.1, "wan-5b": 0.036, "wan-14b": 0.30}


def transformation_rate(output: Tensor, output_before: Tensor, latent: Tensor, latent_before: Tensor) -> Tensor:
    """k = mean |y_a - y_b| / mean |x_a - x_b| -> []; all four of the latent's shape [B, C, (T,) H, W].

    a is the step just computed and b the one computed before it; steps skipped in between take no part.
    """
    return mean_absolute(output - output_before) / mean_absolute(latent - latent_before)


def cache(threshold: float = 0.05, first: int = 5) -> BlockCache:
    """threshold: tau, of the sum of k mean |x_i - x_{i-1}| / mean |y|, y the last computed output; x_{i-1}: the step
    before, skipped or not; first: steps computed at the start, of each branch."""
    return BlockCache(
        threshold,
        "previous",
        accumulate=True,
        warmup=first,
        tail=1,
        max_skips=None,
        scope=Scope("model"),
        signal=Signal("latent", rate=True),
        branches="first",
    )
