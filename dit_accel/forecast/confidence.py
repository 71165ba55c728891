"""Confidence: a forecast counts only while it came nearer than plain reuse at the last computed steps.

Every computed step tells what either would have missed there, over the gap that was just skipped: |y - f| and
|y - last|. Their sums, older ones fading, say which of the two stands in for the next steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MEMORY = 0.5  # of what was known before, at each computed step


@dataclass(frozen=True)
class Confidence:
    """Relative L2 by which forecasts and plain reuse missed the computed steps, [] each, summed, older ones faded."""

    forecast: Tensor
    reuse: Tensor

    def holds(self, most: float) -> Tensor:
        """True while forecasts miss by at most `most` times what reuse does -> [], a flag."""
        return self.forecast <= most * self.reuse


def learn(earlier: Confidence | None, value: Tensor, forecast: Tensor, last: Tensor) -> Confidence:
    """After a computed step with this value [*]: forecast and last [*] are what would have stood in for it."""
    wide = value.float()
    size = wide.norm().clamp_min(1e-30)
    missed = [(wide - other.to(wide)).norm() / size for other in (forecast, last)]
    if earlier is not None:
        missed = [MEMORY * old + new for old, new in zip((earlier.forecast, earlier.reuse), missed)]
    return Confidence(*missed)
