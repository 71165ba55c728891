"""Progressive resolution (Jenga's ProRes, arXiv 2505.16864): early steps on smaller latents, the last at full size.

The early steps of a sampling run settle the layout, for which fewer tokens do. A stage is a call of the plain pipeline
with a smaller height and width and a part of the time steps; it ends at its clean estimate. The next stage begins with
that estimate, made larger and noised again to the noise level of its own first step.

This file: the settings, and which steps and sizes they give; `stages.py` runs them, `latents.py` is the arithmetic.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from dit_accel.errors import PolicyError
from dit_accel.settings import Settings, setting


@dataclass(frozen=True)
class Progressive(Settings):
    """Stages of one sampling run, from small to full size.

    The published settings are scales (0.75, 1) with switches (0.5,), and (0.5, 0.75, 1) with (0.3, 0.5). A run of n
    steps still makes n denoiser steps; what is saved is that early ones have fewer tokens. `Stats.flops_share` does not
    show this: it holds each denoiser call against the plain call of the same size. The result is another sample of the
    same prompt, and no approximation of the plain one: its early noise is of another size.
    """

    scales: tuple[float, ...] = setting((0.75, 1.0), "height and width of each stage over those asked for; rising to 1")
    switches: tuple[float, ...] = setting((0.5,), "share of the steps at which each later stage begins; rising")
    shifts: tuple[float, ...] | None = setting(
        None, "the scheduler's shift in each stage, by its set_shift; null leaves the scheduler's own"
    )
    text_bias: float = setting(
        0.0, "how much smaller stages favour text: times -ln(scale), added to its attention scores", minimum=0.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        scales, switches = self.scales, self.switches
        if not scales or scales[0] <= 0 or scales[-1] != 1 or not _rise(scales):
            raise PolicyError(f"Progressive.scales is {list(scales)}; give sizes above 0 that rise to 1, as [0.75, 1].")
        if len(switches) != len(scales) - 1:
            raise PolicyError(
                f"Progressive.switches has {len(switches)} entries for {len(scales)} scales; give one fewer."
            )
        if not _rise((0.0, *switches, 1.0)):
            raise PolicyError(f"Progressive.switches is {list(switches)}; give shares between 0 and 1 that rise.")
        if self.shifts is not None and (len(self.shifts) != len(scales) or min(self.shifts) <= 0):
            raise PolicyError(
                f"Progressive.shifts is {list(self.shifts)} for {len(scales)} scales; give one number above 0 for each."
            )

    @property
    def is_exact(self) -> bool:
        """True where the only stage is the plain run."""
        return len(self.scales) == 1 and self.shifts is None

    def described(self) -> str:
        """The stages in a sentence."""
        begins = [0.0, *self.switches]
        stages = [f"{scale:g} from {begin:.0%} of the steps on" for scale, begin in zip(self.scales, begins)]
        return f"  Height and width over those asked for: {', '.join(stages)}."


def _rise(values: tuple[float, ...]) -> bool:
    return all(earlier < later for earlier, later in itertools.pairwise(values))


def text_bias_of(progressive: Progressive, stage: int) -> float:
    """What stage number `stage` adds to the scores of text keys: -text_bias * ln sqrt(tokens / tokens at full size).

    Jenga's text-attention amplifier. Tokens go by the square of the scale, so 0 at full size; rounding is left out.
    """
    return -progressive.text_bias * math.log(progressive.scales[stage])


@dataclass(frozen=True)
class Stage:
    """One stage of one call. number: of its scale; begin: share of the steps at which it begins; height, width: in
    pixels, `None` for those of the user."""

    number: int
    begin: float
    height: int | None = None
    width: int | None = None


def plan(progressive: Progressive, height: int, width: int, multiple: int) -> tuple[list[Stage], list[str]]:
    """Stages of a call of this size, and a sentence about each scale that has no stage of its own.

    multiple: of pixels that a side has to be. A scale that rounds to the size of the next one is left out: the next one
    begins in its place, since a switch to the same size would only cost.
    """
    full = height // multiple * multiple, width // multiple * multiple
    sizes = [(_rounded(scale * height, multiple), _rounded(scale * width, multiple)) for scale in progressive.scales]
    sizes[-1] = full
    begins = [0.0, *progressive.switches]
    stages: list[Stage] = []
    sentences: list[str] = []
    begin = 0.0
    for number, size in enumerate(sizes):
        last = number == len(sizes) - 1
        if not last and size == sizes[number + 1]:
            sentences.append(
                f"Progressive.scales {progressive.scales[number]:g} and {progressive.scales[number + 1]:g} are both "
                f"{size[0]} x {size[1]} pixels in multiples of {multiple}, so there is no stage of the first."
            )
            continue
        stages.append(Stage(number, begin, *((None, None) if last else size)))
        begin = 0.0 if last else begins[number + 1]
    return stages, sentences


def _rounded(size: float, multiple: int) -> int:
    return max(1, math.floor(size / multiple + 0.5)) * multiple


def split_steps(count: int, begins: list[float]) -> list[range]:
    """Steps of each stage out of `count`: it begins at the nearest step to its share, and has at least one.

    Raises PolicyError where there are fewer steps than stages.
    """
    stages = len(begins)
    if count < stages:
        raise PolicyError(f"{count} steps are too few for {stages} stages of resolution; give at least {stages} steps.")
    edges = [0]
    for number, begin in enumerate(begins[1:], 1):
        wanted = math.floor(begin * count + 0.5)
        edges.append(min(max(wanted, edges[-1] + 1), count - stages + number))
    return [range(*pair) for pair in itertools.pairwise([*edges, count])]
