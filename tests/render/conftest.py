"""A tiny pipeline in a folder, manifests of it, and ways to compare output folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.cli import main
from dit_accel.render.storage import OURS
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


def manifest(path: Path, count: int, **fields: Any) -> Path:
    """A JSONL manifest of so many different items."""
    rows = [{"prompt": str(number % 9), "id": f"item-{number}"} | fields for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pictures(out: Path) -> dict[str, bytes]:
    """All pictures and videos below a folder."""
    files = [path for path in out.rglob("*") if path.suffix in (".png", ".mp4")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def sidecars(out: Path) -> dict[str, Any]:
    """All sidecars, without what may differ from one render to the next."""
    found = {}
    for path in out.rglob("*.json"):
        data = json.loads(path.read_bytes())
        del data["made"]
        found[path.relative_to(out).as_posix()] = data
    return found


def ledger_lines(out: Path) -> list[dict[str, Any]]:
    """Every line of every ledger that can be read."""
    lines = []
    for path in sorted((out / OURS).glob("ledger*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


def leftovers(out: Path) -> list[str]:
    """Files that no finished render leaves behind."""
    return [path.name for path in out.rglob("*") if path.suffix == ".tmp" or path.name.startswith("unfinished")]
