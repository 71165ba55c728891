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


def _gated(threshold: float, max_skips: int, tail: int, accumulate: bool = False) -> Policy:
    """Our presets: forecast the stack, and go on as long as the probe's own forecast is good enough."""
    cache = BlockCache(threshold, "forecast", accumulate, warmup=3, tail=tail, max_skips=max_skips)
    return Policy(cache, Forecast("newton", order=2))


PRESETS: dict[str, Preset] = {
    "exact": Preset(Policy(), "computes everything, bit-equal to the plain pipeline; only counts"),
    "quality": Preset(
        _gated(0.15, max_skips=3, tail=2, accumulate=True), "about two fifths of the work, differences hard to see"
    ),
    "balanced": Preset(_gated(0.13, max_skips=4, tail=1), "about a third of the work"),
    "fast": Preset(_gated(0.5, max_skips=6, tail=1, accumulate=True), "less than a third of the work, details change"),
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
