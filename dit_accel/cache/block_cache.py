"""Settings of block caching: a probe block always runs, and its residual decides whether the rest of the stack does.

FBCache (ParaAttention, 2024) compares with the last computed step, TeaCache (2411.19108, eq. 6) sums changes between
successive steps, CG-Taylor (2508.02240) measures how well the probe itself was forecast; a fixed interval is
`threshold=None`. Change is relative L1: mean |p - q| / mean |q|.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    probe_blocks: int = setting(
        1, "blocks at the head of the stack that always run (useful: 1 to 4); 0 skips the whole model", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is None and self.max_skips is None:
            raise PolicyError(
                "BlockCache.threshold and BlockCache.max_skips are both null, so it would skip for ever; give one."
            )

        if self.probe_blocks == 0 and self.threshold is not None and self.reference != "corrector":
            raise PolicyError(
                f"BlockCache.probe_blocks is 0, so there is no probe to compare with the {self.reference}; give 1 or "
                "more, the reference 'corrector', or the threshold null."
            )

    @property
    def can_skip(self) -> bool:
        """False where these settings never skip anything, whatever the model does."""
        return self.threshold != 0.0 and self.max_skips != 0

    @property
    def fewest_steps(self) -> int:
        """Fewest denoising steps with which at least one step may be skipped."""
        return max(self.warmup, 2) + self.tail + 1  # the first step observes, the second gives the first anchor
