"""DiCache (2508.17356): a probe of the first blocks says when to compute, and where between two anchors to forecast.

The probe runs every step and is resumed where the step is computed. Its change from step to step is summed against a
threshold; on skipped steps its residual places the stack's residual on the line through the two newest anchors (DCTA).
"""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.signal import Signal
from dit_accel.forecast.settings import Forecast

# (threshold, retention, less the input's change). The retention of 0.2 was read for FLUX; for the two others it is
# taken over from there.
PUBLISHED = {
    "flux": (0.4, 0.2, False),
    "flux-delta-minus": (0.08, 0.0, True),
    "wan2.1": (0.2, 0.2, False),
    "hunyuan-video": (0.1, 0.2, False),
}


def cache(
    threshold: float = 0.4, retention: float = 0.2, minus_input: bool = False, probe_blocks: int = 1
) -> BlockCache:
    """threshold: of the sum of delta_y, or |delta_y - delta_x| with `minus_input`: what the probe does beyond passing
    on the change of its input. retention: the share of the steps that are computed first, rounded (as published up to
    and with step int(share * T)); probe_blocks: 1 to 5."""
    return BlockCache(
        threshold,
        "previous",
        accumulate=True,
        warmup=1,
        tail=1,
        max_skips=None,
        probe_blocks=probe_blocks,
        signal=Signal("probe output", minus_input=minus_input),
        schedule=Schedule(retention=retention),
    )


def forecast() -> Forecast:
    """Trajectory alignment (DCTA), over the two newest anchors."""
    return Forecast("aligned")
