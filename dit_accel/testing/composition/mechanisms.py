"""Mechanisms: the policies of the matrix, small enough for tiny pipelines, and how each shows that it acted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dit_accel import BlockCache, BlockSparse, Forecast, Policy, Session, VectorQuant

# Of six steps the third and the fifth, whatever the features do: random weights change too much for any gate.
CACHE = BlockCache(threshold=None, max_skips=1, warmup=2, tail=1)
SPARSE = BlockSparse(0.5, block_size=16, min_tokens=0, dense_steps=0.0)
VECTORS = VectorQuant(bits=4, smallest=0)


@dataclass(frozen=True)
class Mechanism:
    """acted: what has to be true of a session that ran. tolerance: relative L2 to the plain pipe in the same
    circumstance that the mechanism itself may cost on random weights."""

    name: str
    policy: Policy
    acted: Callable[[Session], bool]
    tolerance: float


def _computed(session: Session) -> bool:
    return session.stats.totals.calls > 0 and session.stats.compute_share == 1.0


def _skipped(session: Session) -> bool:
    decisions = session.stats.totals.decisions
    return session.stats.blocks_run < session.stats.blocks_total and decisions["reuse"] + decisions["forecast"] > 0


def _forecast(session: Session) -> bool:
    """Skipped, and forecast where the scheduler adds no noise of its own and two steps were computed before."""
    noisy = any("adds noise" in sentence for sentence in session.stats.warnings)
    short = max(record.step for record in session.stats.steps) < 4
    return _skipped(session) and (noisy or short or session.stats.totals.decisions["forecast"] > 0)


def _sparse(session: Session) -> bool:
    return session.stats.sparse_calls > 0


def _coded(session: Session) -> bool:
    return set(session.quantized) == set(session.denoisers)


MECHANISMS = {
    mechanism.name: mechanism
    for mechanism in (
        Mechanism("exact", Policy(), _computed, 0.0),
        Mechanism("cache", Policy(CACHE), _skipped, 0.3),
        Mechanism("forecast", Policy(CACHE, Forecast("newton", order=1)), _forecast, 0.3),
        Mechanism("sparse", Policy(attention=SPARSE), _sparse, 0.25),
        Mechanism("weights", Policy(weights=VECTORS), _coded, 0.25),
        Mechanism(
            "all",
            Policy(CACHE, Forecast("newton", order=1), VECTORS, SPARSE),
            lambda session: _forecast(session) and _sparse(session) and _coded(session),
            0.4,
        ),
    )
}
