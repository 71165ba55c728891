"""DiCache: the sum of the errors against numbers worked out by hand; the alignment is
tests/forecast/test_evidence.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from dit_accel.cache.gate import GateState, decide
from dit_accel.cache.methods.dicache import PUBLISHED, cache, forecast

Replay = Callable[..., str]


def test_the_two_errors() -> None:
    assert not cache(*PUBLISHED["flux"]).signal.minus_input
    assert cache(*PUBLISHED["flux-delta-minus"]).signal.minus_input


def test_replay_by_hand(replay: Replay) -> None:
    # Ten steps, a fifth retained: 0 and 1. (As published 2 too, up to and with the share: CCC.C..C.C.)
    # Sums: step 2: .2; 3: .4 -> computed (not below .4); 4: .2; 5: .5 C; 6: .05; 7: .15; 8: .16; 9: last
    errors = [None, 0.2, 0.2, 0.2, 0.2, 0.3, 0.05, 0.1, 0.01, 0.01]
    assert replay(cache(*PUBLISHED["flux"]), errors) == "CC.C.C...C"
    assert replay(cache(*PUBLISHED["flux-delta-minus"]), [0.01] * 6) == "C....C"
    assert replay(cache(0.0, retention=0.0), [0.0] * 5) == "CCCCC"


def test_the_retention_is_rounded_to_the_nearest_step(replay: Replay) -> None:
    # .2 x 28 = 5.6 -> 6, steps 0 to 5; as published 5.6 -> 5, and with it step 5: the same here
    assert replay(cache(9.0), [0.0] * 28) == "C" * 6 + "." * 21 + "C"


@pytest.mark.parametrize("error", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(error: float | None) -> None:
    assert decide(cache(9.0), GateState(accumulated=1.0, skips=1), error, 8, 20).compute


def test_the_forecast_lies_between_two_anchors() -> None:
    assert (forecast().predictor, forecast().anchors, forecast().needs_signal) == ("aligned", 2, True)
