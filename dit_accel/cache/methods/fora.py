"""FORA (2407.01425): compute every N-th step, and in between reuse the attention and MLP outputs of every block.

What is kept is the output before the gate, so that the gate of the present step applies. Static: nothing is measured,
nothing is warmed up, no last step is guarded, and both branches of guidance do the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForaSettings:
    """interval: N; 1 never skips."""

    interval: int = 3


# Rows of the tables in TaylorSeer's paper; the authors' own README runs DiT with an interval of 3.
PUBLISHED: dict[str, tuple[ForaSettings, ...]] = {
    "dit-xl": (ForaSettings(3), ForaSettings(5)),
    "flux": (ForaSettings(3), ForaSettings(6)),
    "hunyuan-video": (ForaSettings(5),),
}


def decide(settings: ForaSettings, step: int) -> bool:
    """Compute this step? step counts the steps of the run from 0. There is no state."""
    return step % settings.interval == 0
