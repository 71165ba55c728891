"""Delta-DiT: which range is left out when, worked out by hand."""

from __future__ import annotations

from dit_accel.cache.methods.delta_dit import FLUX_PORT, DeltaDitSettings, DeltaDitState, decide, skipped_range


def replay(settings: DeltaDitSettings, steps: int, blocks: int) -> str:
    state, marks = DeltaDitState(), ""
    for step in range(steps):
        compute, state = decide(settings, state, step, blocks)
        marks += "C" if compute else "."
    return marks


def test_the_range_changes_ends_at_the_boundary() -> None:
    settings = DeltaDitSettings(interval=3, skipped_blocks=10, boundary=12)
    assert skipped_range(settings, 11, 28) == range(18, 28)
    assert skipped_range(settings, 12, 28) == range(10)
    assert skipped_range(settings, 0, 6) == range(6), "no more blocks than there are"


def test_replay_by_hand() -> None:
    # every third step; the stage changes at 7, where no delta of the front is at hand yet
    assert replay(DeltaDitSettings(3, 10, boundary=7), 12, 28) == "C..C..CC.C.."
    assert replay(DeltaDitSettings(3, 10, boundary=6), 12, 28) == "C..C..C..C.."
    assert replay(DeltaDitSettings(1, 10, boundary=6), 9, 28) == "C" * 9


def test_the_port_to_flux_leaves_out_the_single_blocks() -> None:
    assert skipped_range(FLUX_PORT, 40, 19 + 38) == range(19, 57)
    assert replay(FLUX_PORT, 7, 57) == "C..C..C"
