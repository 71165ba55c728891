"""Settings of block caching: a probe block always runs, and its residual decides whether the rest of the stack does.

FBCache (ParaAttention, 2024) compares with the last computed step, TeaCache (2411.19108, eq. 6) sums changes between
successive steps, CG-Taylor (2508.02240) measures how well the probe itself was forecast; a fixed interval is
`threshold=None`. Change is relative L1: mean |p - q| / mean |q|.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dit_accel.cache.ranking import Ranking
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope
from dit_accel.cache.signal import PROBE, START, Signal
from dit_accel.errors import PolicyError
from dit_accel.settings import Settings, setting

REFERENCES = ("anchor", "previous", "forecast", "corrector")


@dataclass(frozen=True)
class BlockCache(Settings):
    """When is the stack behind the probe block skipped?

    Important: `threshold` is the knob (larger is faster and less exact; 0 never skips), `max_skips` bounds the damage.
    To tinker with: `reference`, `accumulate`, `warmup`, `tail`, `probe_blocks`.
    """

    threshold: float | None = setting(
        0.1, "skip while the indicator is below this; null skips by schedule alone (useful: 0.02 to 0.5)", minimum=0.0
    )
    reference: str = setting(
        "anchor",
        "what the probe residual is compared with: the last computed step, the previous step, or its own forecast; "
        "corrector: the threshold is how far forecasts may lead the sample astray, measured by the corrector",
        choices=REFERENCES,
    )
    accumulate: bool = setting(False, "sum the indicator over skipped steps instead of judging each step alone")
    warmup: int = setting(3, "steps computed at the start of a run (useful: 1 to 8)", minimum=1)
    tail: int = setting(1, "steps computed at the end of a run, where details form (useful: 0 to 4)", minimum=0)
    max_skips: int | None = setting(4, "longest run of skipped steps; null is no limit (useful: 1 to 8)", minimum=0)
    probe_blocks: int = setting(1, "blocks at the head of the stack that always run (useful: 1 to 4)", minimum=0)
    scope: Scope = setting(Scope(), "what is skipped as one, and what is remembered of it")
    signal: Signal = setting(Signal(), "what is compared with its reference")
    schedule: Schedule = setting(Schedule(), "rules of single methods on top of warmup, tail and max_skips")
    branches: str = setting(
        "each",
        "each guidance branch decides for itself, the first decides for all, or (unit model) the later ones are the "
        "first one's output plus a forecast of their difference to it, which changes more slowly",
        choices=("each", "first", "difference"),
    )
    later_skips: int | None = setting(
        None, "difference: longest run of skips of the later branches; null is twice max_skips + 1", minimum=0
    )
    decay: float = setting(
        1.0, "factor that the threshold falls to at the end of a run (SpeCa); 1 keeps it", minimum=0.0, maximum=1.0
    )
    ranking: Ranking | None = setting(
        None, "unit block: recompute the blocks whose forecast moved farthest while the others are skipped (Sortblock)"
    )
    floor: float = setting(0.0, "lowest threshold that the decay leads to", minimum=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = self.schedule
        bounded = (self.max_skips, rule.interval, rule.mask, rule.unit_masks, rule.calibrate, rule.codebook)
        if self.threshold is None and all(bound is None for bound in bounded):
            raise PolicyError(
                "BlockCache.threshold and BlockCache.max_skips are both null, so it would skip for ever; give one."
            )
        gated = self.is_gated
        if gated and self.signal.known_at == PROBE and (self.scope.is_model or not self.probe_blocks):
            raise PolicyError(
                f"BlockCache.signal is {self.signal.of!r}, but there is no probe to compare with the {self.reference}: "
                "give probe_blocks 1 or more and a unit other than 'model', another signal, the reference 'corrector', "
                "or the threshold null."
            )
        if gated and self.scope.is_model and self.signal.known_at != START:
            raise PolicyError(
                f"BlockCache.signal is {self.signal.of!r}, which is known inside the model, but the unit 'model' skips "
                "all of it; give the unit 'stack', or a signal such as 'latent'."
            )
        if rule.codebook is not None and self.signal.of != "units":
            raise PolicyError("Schedule.codebook looks at the signal 'units'; give BlockCache.signal of that kind.")
        if self.branches == "difference" and (not self.scope.is_model or self.threshold is not None):
            raise PolicyError(
                "BlockCache.branches 'difference' is for whole steps that a schedule skips; give the unit 'model' and "
                "the threshold null, or branches 'each' or 'first'."
            )
        if self.branches != "difference" and self.later_skips is not None:
            raise PolicyError(
                f"BlockCache.later_skips belongs to the branches 'difference', not {self.branches!r}; leave it out."
            )
        if self.signal.of == "last block" and not rule.shortest:
            raise PolicyError(
                "The signal 'last block' is measured on skipped steps only; give Schedule.shortest=1 or more, so that "
                "there are any."
            )
        if self.signal.of == "last block" and not self.scope.last_blocks:
            raise PolicyError("The signal 'last block' needs a last block that runs; give Scope.last_blocks=1 or more.")

    @property
    def can_skip(self) -> bool:
        """False where these settings never skip anything, whatever the model does."""
        return self.threshold != 0.0 and (self.max_skips != 0 or self.schedule.growth > 0)

    @property
    def of_later_branches(self) -> BlockCache:
        """What the later branches go by, where they are told from the first by their difference."""
        skips = self.later_skips
        if skips is None and self.max_skips is not None:
            skips = 2 * self.max_skips + 1
        return replace(self, max_skips=skips)

    @property
    def is_gated(self) -> bool:
        """True where a signal is looked at; else schedule or corrector decide alone."""
        return self.reference != "corrector" and (self.threshold is not None or self.schedule.codebook is not None)

    def decides_at(self, needs_probe: bool) -> str:
        """Where in a forward the decision falls. needs_probe: the forecast looks at the probe."""
        if self.scope.is_model:
            return START
        if self.is_gated:
            return self.signal.known_at
        return PROBE if needs_probe else START

    @property
    def fewest_steps(self) -> int:
        """Fewest denoising steps with which at least one step may be skipped."""
        return max(self.warmup, 2) + self.tail + 1  # the first step observes, the second gives the first anchor
