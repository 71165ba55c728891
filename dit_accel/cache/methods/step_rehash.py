"""Static lists of key steps: Step Rehash (arXiv 2411.01171) in our reading, and the published lists of Jenga.

Step Rehash skips steps whose features are close to an earlier step's. Its exact rule is not public; here a step is a
key step when its similarity to the last key step is no longer above a threshold. Jenga (github dvlab-research/Jenga)
skips by a fixed list; the skipped steps reuse the residual of the whole stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.methods.mask import check_budget, mask_of
from dit_accel.cache.schedule import Schedule
from dit_accel.errors import PolicyError

JENGA_STEPS = 50  # the run that both lists were made for
JENGA_TEXT_TO_VIDEO = (0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 26, 29, 32, 35, 38, 41, 43, 45, 46, 47, 49)
# The notes shorten 16 ... 37; every third step between them is inferred.
JENGA_IMAGE_TO_VIDEO = (0, 1, 2, 3, 5, *range(7, 41, 3), 42, 44, 45, 46, 47, 48, 49)


@dataclass(frozen=True)
class StepRehash:
    """threshold: skip while the similarity to the last key step is above this; 1 never skips. No value is published.

    max_skips: longest run of skipped steps, `None` for no limit. The last step is always a key step (our choice).
    """

    threshold: float
    max_skips: int | None = None

    def __post_init__(self) -> None:
        if not -1.0 <= self.threshold <= 1.0:
            raise PolicyError(f"StepRehash.threshold is {self.threshold}; give a cosine similarity from -1 to 1.")
        if self.max_skips is not None and self.max_skips < 0:
            raise PolicyError(f"StepRehash.max_skips is {self.max_skips}; give 0 or more, or null for no limit.")


def key_steps(settings: StepRehash, similarity: Sequence[Sequence[float]]) -> list[int]:
    """Numbers of the key steps, from the similarity of each two steps of a full run [T, T]."""
    steps = len(similarity)
    check_budget(1, steps)
    if any(len(row) != steps for row in similarity):
        raise PolicyError(
            f"The similarity map has rows of {sorted({len(row) for row in similarity})} for {steps} steps; give [T, T]."
        )
    keys = [0]
    for step in range(1, steps):
        # Rounding can lift a cosine above 1, which must not skip at threshold 1. A nan is a key step.
        close = settings.threshold < 1.0 and similarity[keys[-1]][step] > settings.threshold
        allowed = settings.max_skips is None or step - keys[-1] <= settings.max_skips
        if not close or not allowed or step == steps - 1:
            keys.append(step)
    return keys


def cache(threshold: float = 0.95) -> BlockCache:
    """threshold: of the similarity to the last key step, a choice of ours. The first run computes everything and
    measures; later ones compute its key steps."""
    return BlockCache(
        None,
        warmup=1,
        tail=1,
        max_skips=None,
        probe_blocks=0,
        schedule=Schedule(calibrate="step-rehash", budget=threshold),
    )


def jenga(keys: Sequence[int] = JENGA_TEXT_TO_VIDEO) -> BlockCache:
    """One of Jenga's lists, stretched to the run; what the whole stack added is reused."""
    mask = "".join("1" if compute else "0" for compute in mask_of(keys, JENGA_STEPS))
    return BlockCache(None, warmup=1, tail=0, max_skips=None, probe_blocks=0, schedule=Schedule(mask=mask))
