"""The bench of slices, scaled down: the peak of a real process is lower by the wide activations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_accel.bench import slicing


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_the_peak_is_lower_and_the_result_the_same(tmp_path: Path) -> None:
    out = tmp_path / "slicing.json"
    sizes = ["--heads", "4", "--blocks", "2", "--frames", "16", "--side", "16", "--rounds", "1"]
    assert slicing.main([*sizes, "--slices", "8", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    whole, sliced = report["rows"]
    assert report["tokens"] == 4096
    assert report["command"].endswith(f"--out {out}")
    assert (whole["slices"], sliced["slices"]) == (1, 8)
    activation = 4096 * 2987 * 4 / 2**20  # MiB: 512 channels become 2987, before and behind the activation function
    assert sliced["peak_mib"] <= whole["peak_mib"] - activation
    assert sliced["apart"] <= 1e-5
