"""Schedule: which steps must be computed, or may not be, whatever the indicator says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_accel.errors import PolicyError
from dit_accel.settings import Settings, setting

if TYPE_CHECKING:
    from dit_accel.cache.block_cache import BlockCache
    from dit_accel.cache.gate import GateState

CALIBRATIONS = ("smoothcache", "dpcache", "lemica", "cem", "bac", "step-rehash")


@dataclass(frozen=True)
class Schedule(Settings):
    """Rules of single methods, beside warm-up, tail and the longest run. Nothing of it is in force by default."""

    interval: int | None = setting(
        None, "computes the steps whose number it divides, as FORA does; null computes none for this", minimum=1
    )
    retention: float = setting(
        0.0, "share of the run that is computed at its start (MagCache, DiCache)", minimum=0.0, maximum=1.0
    )
    warmup_interval: int = setting(
        1, "the warm-up computes the steps whose number it divides, and skips the others (DBCache)", minimum=1
    )
    most_skips: int | None = setting(None, "skips in the whole run; null is no limit (DBCache)", minimum=0)
    most_change: float | None = setting(
        None, "sum of all indicators in the run at which nothing is skipped any more (DBCache)", minimum=0.0
    )
    mask: str | None = setting(
        None, "one character a step: 1 is computed, 0 may be skipped; stretched to the length of the run"
    )
    unit_masks: tuple[tuple[str, str], ...] | None = setting(
        None, "pairs of a unit ('attention', 'mlp', or a block's number) and its own mask (SmoothCache, BAC, HarmoniCa)"
    )
    growth: float = setting(
        0.0, "by how much each computed step behind the warm-up lengthens the longest run (Spectrum)", minimum=0.0
    )
    shortest: int = setting(0, "skips that follow a computed step before an indicator is heeded (SpeCa)", minimum=0)
    run: float | None = setting(
        None, "share of the run that is skipped at once when the gate passes (BWCache)", minimum=0.0, maximum=1.0
    )
    guard: float | None = setting(
        None,
        "once a skip was made, the last part of the steps then left is computed: this share of them (BWCache: 0.5)",
        minimum=0.0,
        maximum=1.0,
    )
    codebook: tuple[tuple[float, int], ...] | None = setting(
        None, "pairs (bound, gap): an indicator below the bound puts the next computed step that far ahead (AdaCache)"
    )
    window: tuple[float, float] | None = setting(
        None, "time steps from 1000 (noise) to 0, from and to: outside everything is computed (PAB, Sortblock)"
    )
    calibrate: str | None = setting(
        None,
        "the first run computes everything and measures; the masks of the later ones are made of it in this way",
        choices=CALIBRATIONS,
    )
    budget: float | None = setting(
        None,
        "what a calibration aims at: the share of steps that is computed; for smoothcache and step-rehash the bound "
        "on error or similarity",
        minimum=0.0,
        maximum=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        masks = [("mask", self.mask), *((f"unit_masks, {unit}", mask) for unit, mask in self.unit_masks or ())]
        for name, mask in masks:
            if mask is not None and (not mask.startswith("1") or set(mask) - {"0", "1"}):
                raise PolicyError(
                    f"Schedule.{name} is {mask!r}; give a text of 0 and 1 that begins with 1, one character a step."
                )
        if self.codebook is not None and (
            not self.codebook or any(gap < 1 for _, gap in self.codebook) or sorted(self.codebook) != [*self.codebook]
        ):
            raise PolicyError("Schedule.codebook has to hold pairs with rising bounds and gaps of at least 1.")
        if (self.calibrate is None) != (self.budget is None):
            raise PolicyError("Schedule.calibrate and Schedule.budget belong together; give both, or neither.")


def stretched(mask: str, steps: int | None) -> str:
    """A mask for another number of steps. In a longer run each step takes the nearest place; in a shorter one every
    computed step keeps its place, so that no skip reaches farther than it was made for."""
    if steps is None or steps == len(mask) or steps < 2 or len(mask) < 2:
        return mask
    if steps > len(mask):
        scale = (len(mask) - 1) / (steps - 1)
        return "".join(mask[int(step * scale + 0.5)] for step in range(steps))
    scale = (steps - 1) / (len(mask) - 1)
    kept = {int(place * scale + 0.5) for place, character in enumerate(mask) if character == "1"}
    return "".join("1" if step in kept else "0" for step in range(steps))


def is_open(mask: str, step: int, steps: int | None) -> bool:
    """True where the mask lets a step be skipped; past its end everything is computed."""
    known = stretched(mask, steps)
    return step < len(known) and known[step] == "0"


def must_compute(
    cache: BlockCache,
    seen: int,
    remaining: int | None,
    skips: int,
    span: int | None = None,
    *,
    gate: GateState | None = None,
    time: float | None = None,
) -> str | None:
    """The reason why a step has to be computed, or `None` where the gate may decide.

    seen: steps this branch has met in this run; remaining: steps to come including this one, `None` if unknown;
    skips: steps skipped since the last computed one; span: steps from there to the next that the step control allows;
    gate: what the gate remembers; time: time step, 0 to 1000, `None` if unknown.
    """
    rule = cache.schedule
    steps = None if remaining is None else seen + remaining
    early = seen < cache.warmup and seen % rule.warmup_interval == 0
    if early or (steps is not None and seen < int(rule.retention * steps + 0.5)):
        return "warm-up"
    if remaining is not None and remaining <= cache.tail:
        return "tail"
    first = None if gate is None else gate.first_skip
    if (
        rule.guard is not None
        and first is not None
        and steps is not None
        and _is_guarded(rule.guard, first, seen, steps)
    ):
        return "tail"
    if rule.window is not None and (time is None or not rule.window[1] <= time <= rule.window[0]):
        return "outside the window"
    if rule.interval is not None and seen % rule.interval == 0:
        return "interval"
    if rule.mask is not None and not is_open(rule.mask, seen, steps):
        return "mask"
    if span is not None and skips + 1 >= span:
        return "end of span"
    if gate is not None and rule.most_skips is not None and gate.all_skips >= rule.most_skips:
        return "most skips"
    if gate is not None and rule.most_change is not None and gate.all_change >= rule.most_change:
        return "most change"
    if cache.max_skips is not None and skips >= longest_run(cache, 0 if gate is None else gate.computed):
        return "longest run"
    return None


def _is_guarded(guard: float, first_skip: int, step: int, steps: int) -> bool:
    """BWCache (2509.13789): of the steps that were left at the first skip, the last half."""
    return steps - step <= (steps - first_skip) * guard


def longest_run(cache: BlockCache, computed: int) -> int:
    """Skips in a row that are allowed after so many computed steps behind the warm-up.

    Spectrum (2603.01623): a window of `max_skips + 1` steps that every computed step lengthens by `growth`.
    """
    assert cache.max_skips is not None
    return math.floor(cache.max_skips + 1 + cache.schedule.growth * computed) - 1
