"""Delta-DiT (2406.01125): what a range of blocks adds is kept for N steps, of the rear blocks early, of the front late.

The kept delta h^(l2) - h^(l1) is added to the fresh input of the range. Front blocks draw outlines and rear blocks
details, so before the stage boundary the front is computed, and after it the rear. No official code exists, and the
abstract names no default of N, boundary and length of the range.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeltaDitSettings:
    """interval: N; skipped_blocks: length of the range; boundary: first step of the late stage, `None` without one."""

    interval: int
    skipped_blocks: int
    boundary: int | None = None


@dataclass(frozen=True)
class DeltaDitState:
    """kept: the range of blocks whose delta is at hand."""

    kept: range | None = None


# TaylorSeer's port to FLUX: all 38 single-stream blocks are the range, and there is no second stage.
FLUX_PORT = DeltaDitSettings(interval=3, skipped_blocks=38)


def skipped_range(settings: DeltaDitSettings, step: int, blocks: int) -> range:
    """Numbers of the blocks that a skipping step leaves out; the boundary itself is of the late stage (inferred)."""
    count = min(settings.skipped_blocks, blocks)
    early = settings.boundary is None or step < settings.boundary
    return range(blocks - count, blocks) if early else range(count)


def decide(settings: DeltaDitSettings, state: DeltaDitState, step: int, blocks: int) -> tuple[bool, DeltaDitState]:
    """Compute all blocks in this step? Every N-th step, and where the delta of the range is not at hand.

    The second case is the first step behind the boundary (inferred: nothing says where its delta comes from).
    """
    wanted = skipped_range(settings, step, blocks)
    return step % settings.interval == 0 or state.kept != wanted, DeltaDitState(wanted)
