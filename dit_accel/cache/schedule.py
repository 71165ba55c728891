"""Which steps must be computed whatever the indicator says: warm-up, tail, longest run of skips."""

from __future__ import annotations

from dit_accel.cache.block_cache import BlockCache


def must_compute(
    cache: BlockCache, seen: int, remaining: int | None, skips: int, span: int | None = None
) -> str | None:
    """The reason why a step has to be computed, or `None` where the gate may decide.

    seen: steps this branch has met in this run; remaining: steps to come including this one, `None` if unknown;
    skips: steps skipped since the last computed one; span: steps from there to the next that the step control allows.
    """
    if seen < cache.warmup:
        return "warm-up"
    if remaining is not None and remaining <= cache.tail:
        return "tail"
    if span is not None and skips + 1 >= span:
        return "end of span"
    if cache.max_skips is not None and skips >= cache.max_skips:
        return "longest run"
    return None
