"""Every tiny pipeline: bit-equal when exact, really skipping when forced to, and back to what it was afterwards."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel import BlockCache, Forecast, Policy, Session
from dit_accel.cache import Scope
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.checks import FORCED, block_calls, counted_leaves, traces
from dit_accel.testing.tiny_pipelines import TinyPipeline

STEPS = 8
TAIL = Policy(BlockCache(threshold=None, max_skips=99, warmup=2, tail=2))


@dataclass
class Ran:
    """One pipeline after a plain, an exact, two forced and one more plain call."""

    tiny: TinyPipeline
    plain: Tensor
    exact: Tensor
    forced: list[Tensor]
    restored: Tensor
    session: Session
    plain_blocks: int  # block calls of one plain call and of the second forced call, counted inside the blocks
    forced_blocks: int
    before: list
    after: list


@pytest.fixture(scope="module", params=tiny_pipelines.NAMES)
def ran(request: pytest.FixtureRequest) -> Iterator[Ran]:
    tiny = tiny_pipelines.build(request.param)
    denoisers = [getattr(tiny.pipe, name) for name in tiny.denoisers]
    with counted_leaves(denoisers) as plain_leaves:
        plain = tiny_pipelines.call(tiny, STEPS)
    before = traces(tiny.pipe)
    with dit_accel.apply(tiny.pipe, "exact"):
        exact = tiny_pipelines.call(tiny, STEPS)
    with dit_accel.apply(tiny.pipe, FORCED) as session:
        forced = [tiny_pipelines.call(tiny, STEPS)]
        with counted_leaves(denoisers) as forced_leaves:
            forced.append(tiny_pipelines.call(tiny, STEPS))
    after = traces(tiny.pipe)
    restored = tiny_pipelines.call(tiny, STEPS)
    counts = block_calls(plain_leaves, plain_leaves), block_calls(plain_leaves, forced_leaves)
    yield Ran(tiny, plain, exact, forced, restored, session, *counts, before, after)


def test_exact_is_bit_equal(ran: Ran) -> None:
    assert torch.equal(ran.exact, ran.plain)


def test_a_forced_skip_really_skips(ran: Ran) -> None:
    totals = ran.session.stats.runs[1]
    assert set(ran.session.denoisers) == set(ran.tiny.denoisers)
    assert (totals.blocks_run, totals.blocks_total) == (ran.forced_blocks, ran.plain_blocks)
    assert totals.decisions["forecast"] + totals.decisions["reuse"] > 0 and totals.flops_share < 1.0
    assert ran.forced_blocks < ran.plain_blocks * 0.85
    assert bool(torch.isfinite(ran.forced[0]).all())
    assert not torch.equal(ran.forced[0], ran.plain)
    assert all("adds noise of its own" in warning for warning in ran.session.stats.warnings)


def test_the_same_call_twice_is_bit_equal(ran: Ran) -> None:
    assert torch.equal(ran.forced[0], ran.forced[1])


def test_remove_leaves_nothing_behind(ran: Ran) -> None:
    assert ran.after == ran.before
    assert torch.equal(ran.restored, ran.plain)


def test_the_last_steps_of_a_run_are_known_and_computed(ran: Ran) -> None:
    with dit_accel.apply(ran.tiny.pipe, TAIL) as session:
        tiny_pipelines.call(ran.tiny, STEPS)
    steps = session.stats.steps
    last = max(step.step for step in steps)
    assert last + 1 <= STEPS and any(step.decision == "reuse" for step in steps)
    for step in steps:
        assert (step.reason == "tail") == (step.step >= last - 1), step


def test_there_are_at_least_34_pipeline_classes() -> None:
    assert len({type(tiny_pipelines.build(name, blocks=4).pipe) for name in tiny_pipelines.NAMES}) >= 34


CORRECTED = Policy(
    BlockCache(threshold=9.0, reference="corrector", warmup=2, tail=1, max_skips=2, scope=Scope("model", "output")),
    Forecast("newton", order=1, corrector=1),
)


@pytest.mark.parametrize("name", tiny_pipelines.NAMES)
def test_whole_steps_are_skipped_and_corrected_on_every_scheduler(name: str) -> None:
    tiny = tiny_pipelines.build(name)
    plain = tiny_pipelines.call(tiny, STEPS)
    before = traces(tiny.pipe)
    with dit_accel.apply(tiny.pipe, CORRECTED) as session:
        first = tiny_pipelines.call(tiny, STEPS)
        again = tiny_pipelines.call(tiny, STEPS)
    assert torch.equal(first, again) and bool(torch.isfinite(first).all())
    assert traces(tiny.pipe) == before and torch.equal(tiny_pipelines.call(tiny, STEPS), plain)
    skipped = [record for record in session.stats.steps if record.decision == "forecast"]
    corrected = [audit for audit in session.stats.audits if audit.span > 1]
    if not corrected:
        words = ("adds noise", "without a model call")
        assert not skipped and any(word in session.report() for word in words), session.report()
        assert torch.equal(first, plain), "what cannot be judged is computed"
    else:
        assert skipped and all(record.flops == 0 and record.blocks_run == 0 for record in skipped)
