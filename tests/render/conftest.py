"""A tiny pipeline in a folder, and the command on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.cli import main
from dit_accel.testing import tiny_pipelines

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-to-image pipeline of 4 random blocks; its prompts are numbers of classes."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("pipelines") / "tiny-dit"
    tiny_pipelines.build("dit", 4).pipe.save_pretrained(path)
    (path / "dit_accel_defaults.json").write_text(json.dumps({"guidance_scale": 1.0, "num_inference_steps": 3}))
    return path


@pytest.fixture(scope="session")
def pipe(folder: Path) -> Any:
    """The same, loaded once."""
    from dit_accel.cli import load_pipeline

    return load_pipeline(folder)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], folder: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`dit-accel render` in this process, on the loaded pipeline, without a policy unless one is given."""
    monkeypatch.setattr("dit_accel.cli.load_pipeline", lambda *_: pipe)

    def call(jobs: Path, out: Path, *words: str, policy: str = "none") -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["render", str(jobs), "--pipeline", str(folder), "--out", str(out), "--policy", policy, *words])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call
