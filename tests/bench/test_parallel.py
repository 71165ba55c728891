"""The bench of gates on two ranks, in one process: which steps were computed, and that nothing stays behind.

The ranks themselves are tests/composition/test_context_parallel.py's; one setting takes half a minute.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit_accel.bench import parallel
from dit_accel.bench.parallel import METHODS, computed, main
from dit_accel.testing.checks import traces
from dit_accel.testing.ranks import STEPS
from dit_accel.testing.tiny_pipelines import build, call


@pytest.mark.parametrize("method", list(METHODS))
def test_steps_are_told_from_what_ran(method: str) -> None:
    if method.startswith("cache-dit"):
        pytest.importorskip("cache_dit", reason="cache-dit belongs to the extra `bench`")
    tiny = build("flux")
    plain = call(tiny, STEPS)
    before = traces(tiny.pipe)
    never, steps = computed(tiny, METHODS[method](1e-9))
    assert steps == "1" * STEPS and torch.allclose(never, plain, atol=1e-5)
    _, steps = computed(tiny, METHODS[method](1e9))
    assert len(steps) == STEPS and steps[0] == "1" and "0" in steps
    if method.startswith("dit_accel"):
        assert traces(tiny.pipe) == before


def test_rows_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(parallel, "measure", lambda method, threshold: {"method": method, "threshold": threshold})
    assert main(["--out", str(tmp_path / "parallel.json")]) == 0
    assert capsys.readouterr().out.count("\n") == len(METHODS) * len(parallel.THRESHOLDS)
    assert '"cache-dit F1B0"' in (tmp_path / "parallel.json").read_text()
