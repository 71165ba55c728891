"""The bench of a GPU without one: what its rows say of methods that run or fail, and what is kept when a part fails."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dit_accel.bench import gpu

ARGUMENTS = argparse.Namespace(device="cpu", rounds=2, text=3, side=4, steps=2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(1, 1)


class Pipe:
    """Calls its blocks as often as there are steps, and `calls` can make it fail or skip."""

    def __init__(self) -> None:
        self.transformer: Any = SimpleNamespace(
            transformer_blocks=[Block(), Block()], single_transformer_blocks=[Block(), Block()]
        )
        self.skip, self.fails = 0, False

    def __call__(self, num_inference_steps: int, **given: Any) -> Any:
        if self.fails:
            raise TypeError("no\n such   thing")
        blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
        for _ in range(num_inference_steps):
            for block in blocks[self.skip :]:
                block.attn.to_q(torch.zeros(1, 1))
        return SimpleNamespace(images=given["prompt_embeds"])


def setting(name: str, value: Any) -> gpu.Attach:
    def attach(pipe: Any) -> Any:
        earlier = getattr(pipe, name)
        setattr(pipe, name, value)
        return lambda: setattr(pipe, name, earlier)

    return attach


def test_rows_say_what_ran_and_what_failed() -> None:
    methods = {"plain": setting("skip", 0), "half": setting("skip", 2), "broken": setting("fails", True)}
    plain, half, broken, again = gpu.compared(Pipe(), methods, ARGUMENTS, way="eager")
    assert plain["method"] == "plain" and plain["blocks"] == 8 and plain["finite"] and plain["way"] == "eager"
    assert half["blocks"] == 4 and half["block_share"] == 0.5 and half["time_share"] > 0
    assert broken == {"method": "broken", "way": "eager", "error": "TypeError: no such thing"}
    assert again["method"] == "plain, again" and again["block_share"] == 1.0


def test_a_part_that_fails_leaves_the_others_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: argparse.Namespace) -> list[gpu.Row]:
        raise ValueError("out of memory")

    parts = {"first": lambda arguments: [{"seconds": 1.0}], "second": broken, "third": lambda arguments: [{"bits": 2}]}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--parts", *parts]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["first"] == [{"seconds": 1.0}] and report["third"] == [{"bits": 2}] and report["device"] == "cpu"
    assert report["second"] == [{"error": "ValueError: out of memory"}]


def test_every_method_of_the_bench_of_compiling_is_in_it() -> None:
    assert set(gpu.CACHES) < set(gpu.METHODS) and next(iter(gpu.METHODS)) == "plain"
    assert list(gpu.METHODS)[-1].startswith("cache-dit")
