"""The bench of offload: what it counts on a small pipeline, what it holds for right, and what its record promises."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from dit_accel.bench import offload as bench

RECORD = Path(__file__).parents[2] / "docs" / "results" / "offload.json"
SMALL = argparse.Namespace(width=64, double=2, single=2, side=16, steps=6)  # of 4 blocks; 2 steps are skipped


@pytest.mark.parametrize("way", [bench.DISK, "blocks, in memory", "accelerate, leaves on disk"])
@pytest.mark.parametrize("order", bench.ORDERS)
def test_we_load_what_runs_and_nothing_else(way: str, order: str) -> None:
    row = bench.count("ours, blocks skipped", way, order, SMALL)
    assert (row.error, row.ran, row.loaded, row.spare, row.missed) == ("", 6 + 3 * 4, 6 + 3 * 4, 0, 0)


def test_whole_steps_do_not_load_what_is_outside_of_the_blocks_either() -> None:
    row = bench.count("ours, whole steps skipped", bench.DISK, "offload first", SMALL)
    assert (row.ran, row.loaded, row.outside) == (4 * 4, 4 * 4, 4)


def test_loads_are_counted_in_bytes_and_each_weight_once() -> None:
    row = bench.count("plain", bench.DISK, "offload first", SMALL)
    model = bench.pipeline(SMALL.width, SMALL.double, SMALL.single).transformer
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / bench.MIB
    assert row.inside_mib + row.outside_mib == pytest.approx(SMALL.steps * size, abs=0.11)
    assert row.left_mib == 0 and row.at_once_mib < row.inside_mib / SMALL.steps


def test_a_rival_that_is_switched_on_first_loads_what_it_skips() -> None:
    """The counter is no tautology: it tells blocks that are loaded and do not run."""
    row = bench.count("diffusers TaylorSeer lite", bench.DISK, "method first", SMALL)
    assert row.loaded == 4 * 6 and row.ran == 4 * 4 and row.spare == 4 * 2


def test_what_does_not_run_on_a_cpu_says_so() -> None:
    row = bench.count("plain", "blocks, prefetched", "offload first", SMALL)
    assert row.ran == row.loaded == 0 and row.error.startswith("ValueError: Using streams")


def test_what_is_held_is_seen_as_the_session_counts_it() -> None:
    plain, _, _ = bench.growth("plain", SMALL)
    for method, share in (("ours, blocks skipped", 1.0), ("ours, blocks skipped, kept in bfloat16", 0.5)):
        grown, session, away = bench.growth(method, SMALL)
        assert session is not None
        anchors, tokens = 2, 64 + 32  # of the picture and the text
        assert session.stats.state_bytes == share * anchors * tokens * SMALL.width * 4
        assert away == (session.stats.state_bytes if share < 1 else 0)
        latent = 64 * 16 * 4  # the session keeps the arguments of the last call as well
        seen = max(own - other for own, other in zip(grown, plain, strict=True))
        assert 0 <= seen - session.stats.state_bytes <= latent + 64


def test_a_result_that_is_not_finite_is_wrong_and_its_order_not_chosen() -> None:
    rows = [
        bench.Loads("one", bench.DISK, "offload first", 40, 40, apart=None),
        bench.Loads("one", bench.DISK, "method first", 40, 60, apart=1e-7),
    ]
    assert [bench.is_right(row) for row in rows] == [False, True]
    assert bench.best_order("one", bench.DISK, rows) == "method first"
    assert bench.best_order("two", bench.DISK, rows) is None
    line = bench.text(rows, [bench.Held("one", 2048)], [bench.Speed("one", "none", "offload first", 1.5, 2.0)])
    assert "| one | 40 | 40, **wrong result** | 60 | 0 | 0 |" in line
    assert "| one | 2 |  |  |" in line and "| one | 1.50, 2.00 |  |" in line


def test_two_calls_count_the_same() -> None:
    torch.manual_seed(1)  # the bench seeds by itself
    row = bench.count("cache-dit F1B0", bench.DISK, "method first", SMALL)
    torch.manual_seed(2)
    assert bench.count("cache-dit F1B0", bench.DISK, "method first", SMALL) == row


def test_the_record_keeps_what_was_promised() -> None:
    """No block of ours is loaded without running, in any way and order, and none is wrong."""
    record = json.loads(RECORD.read_text())
    rows = [row for row in record["loads"] if row["method"].startswith("ours")]
    assert {row["way"] for row in rows} == {
        bench.DISK,
        "blocks, in memory",
        "accelerate, leaves on disk",
        "accelerate, model",
    }
    for row in rows:
        assert not row["error"] and row["spare"] == row["missed"] == 0 and row["apart"] < 1e-3
        assert row["loaded"] in (row["ran"], 0) and row["ran"] < 60
    assert {row["loaded"] for row in rows if row["way"] == "accelerate, model"} == {0}
