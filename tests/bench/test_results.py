"""Results: what is written is read back, and a partial run keeps what it did not measure."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dit_accel.bench.curves import recorded
from dit_accel.bench.measure import Result
from dit_accel.bench.results import read_results, write_results
from dit_accel.errors import ArgumentError

ROWS = [
    Result("fewer steps", "8 steps", 3.0, 0.16, 30.5, 29.25, 31.75, 20.0, 4),
    Result("dit_accel fast", "preset", 3.0, 0.25, 45.0, 44.0, 46.0, 33.0, 7),
]


def workload(items: int) -> Any:
    return cast(Any, SimpleNamespace(prompts=["a"] * items, steps=50))


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_results(ROWS, tmp_path, "bench", {"items": 2, "steps": 50})
    assert read_results(tmp_path / "bench.csv") == ROWS
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_partial_run_keeps_the_other_families(tmp_path: Path) -> None:
    assert recorded(tmp_path / "bench", workload(2), "dit_accel") == ([], {})
    write_results(ROWS, tmp_path, "bench", {"items": 2, "steps": 50, "date": "2026-11-22"})
    kept, about = recorded(tmp_path / "bench", workload(2), "dit_accel")
    assert kept == ROWS[:1] and about["date"] == "2026-11-22"
    with pytest.raises(ArgumentError, match="holds 2 items of 50 steps, but this run has 3"):
        recorded(tmp_path / "bench", workload(3), "dit_accel")
