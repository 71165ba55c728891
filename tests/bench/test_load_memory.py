"""The bench of memory while loading, scaled down: neither a dense model nor the files' pages are held meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.bench import load_memory
from dit_accel.weights import codebook

SIZE = ["--double", "2", "--single", "2", "--heads", "8", "--dtype", "float32"]
SMALL = ["--double", "1", "--single", "1", "--heads", "1", "--dtype", "float32"]
BESIDE = 32.0  # MiB for what is held once, beside the layers; 3 as measured
# glibc keeps freed blocks of up to 32 MiB in its heap, as many as chance has it; the bench's own layers are larger.
UNMAPPED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def nearest(vectors: Tensor, *_: Any) -> Tensor:
    """In place of the search for codewords, which takes time and no memory."""
    return torch.zeros(len(vectors), dtype=torch.int64)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_loading_takes_the_quantised_size_and_one_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(codebook, "nearest", nearest)
    for step in ("save", "quantise"):
        load_memory.main([*SIZE, "--step", step, str(tmp_path)])
    saved = json.loads(capsys.readouterr().out.splitlines()[0])
    code = f"""if True:
        import torch
        from dit_accel.weights import codebook
        from dit_accel.bench.load_memory import main
        codebook.nearest = lambda vectors, *_: torch.zeros(len(vectors), dtype=torch.int64)
        for step in ("save", "quantise", "reload"):  # pages in the code, which differs from machine to machine
            main([*{SMALL!r}, "--step", step, {str(tmp_path / "small")!r}])
        for step in ("reload", "quantise"):
            main([*{SIZE!r}, "--step", step, {str(tmp_path)!r}])
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | UNMAPPED, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[-2:]:
        found = json.loads(line)
        allowed = load_memory.SHARE * found["size"] + saved["largest_layer"] + BESIDE
        assert found["rss"] <= allowed < 0.7 * saved["size"], (found, saved)


def test_the_report_says_whether_the_promise_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {
        "save": {"size": 100.0, "largest_layer": 10.0},
        "dense": {"size": 100.0, "rss": 100.0},
        "quantise": {"size": 20.0, "rss": 34.0},
        "reload": {"size": 20.0, "rss": 34.1},
    }

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, json.dumps(rows[command[command.index("--step") + 1]]) + "\n")

    monkeypatch.setattr(subprocess, "run", answer)
    assert load_memory.main(["--out", str(tmp_path / "made" / "report.json")]) == 0
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["quantise"] == {"size": 20.0, "rss": 34.0, "allowed": 34.0, "kept": True}
    assert report["reload"]["kept"] is False
    assert report["bits"] == 2
