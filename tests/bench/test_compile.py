"""The bench of torch.compile: what it counts, and the tables that it writes."""

import json
from pathlib import Path

from dit_accel.bench import compile as bench

RECORD = Path(__file__).parents[2] / "docs" / "results" / "compile.json"


def test_a_method_that_cannot_be_traced_says_so() -> None:
    row = bench.count("diffusers TaylorSeer", "blocks")
    assert row.graphs == 0 and row.error.startswith("Unsupported")


def test_the_tables_multiply_what_each_does_alone() -> None:
    speeds = [
        bench.Speed("plain", "eager", 4.0, 1.0),
        bench.Speed("ours", "eager", 2.0, 2.0),
        bench.Speed("plain", "blocks", 3.0, 1.5),
        bench.Speed("ours", "blocks", 1.5, 2.7, 1e-7),
    ]
    lines = bench.text([bench.Graphs("ours", "whole", 3, 0, 0)], speeds).splitlines()
    assert lines[2] == "| ours | whole | 3 | 0 | 0 |"
    assert lines[-1] == "| ours | blocks | 1.50 | 2.70 | 3.00 | 1e-07 |"


def test_the_record_keeps_what_was_promised() -> None:
    """At most three graph breaks for a whole Flux transformer, none in a block, and nothing anew in a second run."""
    rows = [row for row in json.loads(RECORD.read_text())["graphs"] if row["method"].startswith("ours")]
    assert len(rows) == 4
    for row in rows:
        assert not row["error"] and row["later"] == 0 and row["breaks"] <= (0 if row["way"] == "blocks" else 3)
