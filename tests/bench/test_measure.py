"""Work counter: what rivals and ours are charged with, checked against our own count on a tiny pipeline."""

import pytest

import dit_accel
from dit_accel import BlockCache, Policy
from dit_accel.bench.measure import WorkCounter
from dit_accel.testing import tiny_pipelines


def test_counted_work_is_that_of_the_blocks_that_ran() -> None:
    tiny = tiny_pipelines.build("flux", 6)
    policy = Policy(BlockCache(threshold=None, max_skips=2, warmup=2, tail=0))
    counter = WorkCounter(tiny.pipe.transformer, [1 / 6] * 6)
    with dit_accel.apply(tiny.pipe, policy) as session:
        tiny_pipelines.call(tiny, steps=8)
    counter.remove()
    assert counter.done == pytest.approx(session.stats.blocks_run / 6)
    assert session.stats.blocks_run < session.stats.blocks_total
    tiny_pipelines.call(tiny, steps=2)
    assert counter.done == pytest.approx(session.stats.blocks_run / 6), "hooks are gone after remove"
