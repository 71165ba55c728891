"""FBCache: each change alone against the threshold, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from dit_accel.cache.gate import GateState, decide
from dit_accel.cache.methods.fbcache import FLUX_THRESHOLDS, cache

Replay = Callable[..., str]


def test_replay_by_hand(replay: Replay) -> None:
    # the changes are to the last computed step and so are not summed: only .12 is over .1. No last step is guarded
    assert replay(cache(0.1), [None, 0.04, 0.04, 0.04, 0.09, 0.02, 0.12, 0.02]) == "C.....C."


def test_neither_a_warm_up_nor_a_longest_run(replay: Replay) -> None:
    assert replay(cache(0.1), [None] + [0.01] * 40) == "C" + "." * 40


def test_a_change_as_large_as_the_threshold_computes(replay: Replay) -> None:
    # ParaAttention and diffusers compute above the threshold only; the gate from it on
    assert replay(cache(0.125), [None, 0.125, 0.124]) == "CC."


def test_a_threshold_of_zero_never_skips(replay: Replay) -> None:
    assert replay(cache(0.0), [None] + [0.0] * 4) == "CCCCC"


@pytest.mark.parametrize("change", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(change: float | None) -> None:
    assert decide(cache(), GateState(skips=3), change, 5, 20).compute


def test_one_block_is_the_probe() -> None:
    assert (cache().probe_blocks, cache().signal.of, cache().reference) == (1, "probe", "anchor")
    assert cache().threshold in FLUX_THRESHOLDS
