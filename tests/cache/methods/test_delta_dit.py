"""Delta-DiT: which range is left out when, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

from dit_accel.cache.methods.delta_dit import FLUX_PORT, cache
from dit_accel.cache.scope import ranges

Replay = Callable[..., str]


def test_the_range_changes_ends_at_the_boundary() -> None:
    scope = cache(3, 10, 0.5).scope
    assert ranges(scope, 0, 28, 11 / 24) == ((18, 27),)
    assert ranges(scope, 0, 28, 12 / 24) == ((0, 9),), "the boundary itself is of the late stage"
    assert ranges(scope, 0, 6) == ((0, 5),), "no more blocks than there are"


def test_replay_by_hand(replay: Replay) -> None:
    # Every third step. Of the range that step 6 has left behind nothing is at hand where the stage changes at 7 of 12:
    # it is another one then, and so `Forward` computes step 7 as well, C..C..CC.C.. (no matter for the gate)
    settings = cache(3, 10, 7 / 12)
    assert replay(settings, [None] * 12) == "C..C..C..C.."
    assert ranges(settings.scope, 0, 28, 6 / 12) != ranges(settings.scope, 0, 28, 7 / 12)
    assert replay(cache(1, 10), [None] * 9) == "C" * 9


def test_the_port_to_flux_leaves_out_the_single_blocks(replay: Replay) -> None:
    assert ranges(FLUX_PORT.scope, 0, 19 + 38, 0.8) == ((19, 56),)
    assert replay(FLUX_PORT, [None] * 7) == "C..C..C"
