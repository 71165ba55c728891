"""Step control: how far ahead the next computed step may lie, from how far the last forecast led the sample astray.

Milne's device (Hairer, Norsett, Wanner, Solving ODEs I, III.7): where predictor and corrector disagree by d over a span
of n steps, an error that grows with the cube of the span stays below the tolerance t for n (t / d)^(1/3) steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GROWTH = 2  # steps by which a span may exceed the one before; without a limit one lucky span is paid for by the next


@dataclass(frozen=True)
class StepControl:
    """What is remembered between computed steps of a run. span: the next computed step lies this many steps ahead."""

    span: int = 1

    def after(self, distance: float, span: int, tolerance: float, longest: int | None) -> StepControl:
        """State after an audit: forecasts over `span` steps missed by `distance`, relative to the sample.

        A span of 1 skipped nothing; its audit asks what one skipped step would have cost. longest: `None` is no limit.
        """
        if not math.isfinite(distance):
            return StepControl(2)  # the gate looks at the features themselves, and refuses those that are not finite
        if span == 1:
            wanted = 2 if distance <= tolerance else 1
        elif distance <= 0.0:
            wanted = span + GROWTH
        else:
            wanted = min(math.floor(span * (tolerance / distance) ** (1 / 3)), span + GROWTH)
        return StepControl(max(1, wanted if longest is None else min(wanted, longest)))
