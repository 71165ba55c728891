"""Presets and published methods by name. Recorded measurement behind each preset: docs/presets.md."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.cache import BlockCache
from dit_accel.forecast import Forecast
from dit_accel.policy import Policy


@dataclass(frozen=True)
class Preset:
    """A named policy and one sentence that says what it is."""

    policy: Policy
    description: str


def _corrected(tolerance: float) -> Policy:
    """Our presets: whole steps are forecast, corrected afterwards, and as many as the corrector found harmless."""
    cache = BlockCache(tolerance, "corrector", warmup=4, tail=1, max_skips=5, probe_blocks=0)
    return Policy(cache, Forecast("newton", order=2, damping=0.5, corrector=2))


PRESETS: dict[str, Preset] = {
    "exact": Preset(Policy(), "computes everything, bit-equal to the plain pipeline; only counts"),
    "quality": Preset(_corrected(0.002), "a third to a half of the work, differences hard to see"),
    "balanced": Preset(_corrected(0.004), "a third of the work, differences seldom seen"),
    "fast": Preset(_corrected(0.012), "a quarter of the work, details change"),
    "fbcache": Preset(
        Policy(BlockCache(threshold=0.1, max_skips=None, warmup=1, tail=0)),
        "First Block Cache (ParaAttention): reuse while the first block's residual is near the last computed one",
    ),
    "fora": Preset(
        Policy(BlockCache(threshold=None, max_skips=2, warmup=1, tail=0)),
        "FORA (2407.01425) on the stack: compute every third step, reuse between",
    ),
    "taylorseer": Preset(
        Policy(BlockCache(threshold=None, max_skips=4, warmup=3, tail=0), Forecast("taylor", order=1)),
        "TaylorSeer (2503.06923) on the stack: compute every fifth step, published Taylor formula between",
    ),
}
