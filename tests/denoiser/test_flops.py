"""Counted floating-point operations against numbers worked out by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dit_accel
from dit_accel import BlockCache, Policy
from dit_accel.denoiser.flops import FlopMeter, attention_flops
from dit_accel.diffusers_bridge import hides_from_counters

BATCH, HEADS, WIDTH, BLOCKS = 2, 2, 8, 4
POLICY = Policy(BlockCache(threshold=None, max_skips=1, warmup=2, tail=0))
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


class AttentionBlock(nn.Module):
    """x + projection(attention(x)), x [B, S, D], without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.processor: Any = None

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, _ = x.shape
        q, k, v = self.qkv(x).view(batch, rows, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, rows, WIDTH))


class ToyDiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(BLOCKS))
        self.proj_out = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


def block_flops(rows: int) -> int:
    """Two FLOPs a multiply-add: the three input projections, the output's, and the two products of attention."""
    linear = 2 * BATCH * rows * WIDTH * (3 * WIDTH) + 2 * BATCH * rows * WIDTH * WIDTH
    return linear + 2 * (2 * BATCH * rows * rows * WIDTH)


def model_flops(rows: int) -> int:
    return BLOCKS * block_flops(rows) + 2 * BATCH * rows * WIDTH * 3


def run(session: Any, rows: int, steps: int = 3) -> None:
    with session.run():
        for step in range(steps):
            session.target(torch.ones(BATCH, rows, WIDTH), timestep=torch.tensor([float(step)]))


def counted(module: nn.Module, *args: Any) -> int:
    meter = FlopMeter(module)
    with torch.no_grad(), meter.measuring("key"):
        module(*args)
        return meter.read()


@pytest.mark.parametrize("rows", [1, 5, 16])
@modes
def test_steps_cost_what_is_worked_out_by_hand(rows: int, mode: Callable[[], Any]) -> None:
    session = dit_accel.apply(ToyDiT(), POLICY)
    with mode():
        run(session, rows)
    assert [record.flops_total for record in session.stats.steps] == [model_flops(rows)] * 3
    saved = (BLOCKS - 1) * block_flops(rows)
    assert [record.flops for record in session.stats.steps] == [model_flops(rows)] * 2 + [model_flops(rows) - saved]
    assert session.stats.flops_source == "measured"
    assert session.stats.flops_share == 1 - saved / (3 * model_flops(rows))


def test_another_shape_is_counted_anew() -> None:
    session = dit_accel.apply(ToyDiT(), POLICY)
    with torch.no_grad():
        for rows in (5, 16, 5):
            run(session, rows, steps=2)
    assert [record.flops_total for record in session.stats.steps[::2]] == [model_flops(rows) for rows in (5, 16, 5)]


def test_a_linear_layer_and_a_product_by_hand() -> None:
    assert counted(nn.Linear(3, 5), torch.ones(7, 3)) == 2 * 7 * 3 * 5
    assert counted(nn.Conv1d(3, 5, 2), torch.ones(1, 3, 9)) == 2 * 8 * 3 * 5 * 2
    assert counted(nn.ReLU(), torch.ones(7, 3)) == 0


@pytest.mark.parametrize(
    ("query", "key", "value", "flops"), [(4, 4, 4, 2 * 2 * 3 * 5 * 7 * 8), (4, 4, 6, 2 * 2 * 3 * 5 * 7 * 10)]
)
def test_attention_by_hand(query: int, key: int, value: int, flops: int) -> None:
    q, k, v = torch.ones(2, 3, 5, query), torch.ones(2, 3, 7, key), torch.ones(2, 3, 7, value)
    assert attention_flops(q, k, v, 0.0, is_causal=False, out_val=None) == flops


def test_a_known_shape_is_not_counted_again() -> None:
    linear = nn.Linear(2, 2)
    meter = FlopMeter(linear)
    with torch.no_grad(), meter.measuring("key"):
        linear(torch.ones(3, 2))
        meter.keep("key", [10], [0], [(linear, "")])
    with torch.no_grad(), meter.measuring("key"):
        linear(torch.ones(3, 2))
        assert meter.read() == 0
    meter.keep("key", [99], [0], [(linear, "")])
    assert meter.of("key", "-")[1] - meter.of("key", "-")[0] == 10


def test_an_error_inside_ends_the_count() -> None:
    meter = FlopMeter(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="inside"), meter.measuring("key"):
        raise ValueError("inside")
    assert meter.read() == 0 and meter.tables == {}
    with torch.no_grad(), meter.measuring("key"):
        meter.module(torch.ones(1, 2))
        assert meter.read() == 8


@pytest.mark.parametrize(
    ("symbols", "made"),
    [("####", 100), ("#---", 40), ("#~~~", 40), ("!!!!", 100), ("#-#-", 60), ("###", 100), ("#-", 100), ("", 100)],
)
def test_flops_made_by_the_symbols_of_a_call(symbols: str, made: int) -> None:
    """Symbols of another number of calls than were counted belong to a broken contract, where everything ran."""
    meter = FlopMeter(nn.Linear(2, 2))
    meter.tables["key"] = (100, (10, 15, 20, 25))
    assert meter.of("key", symbols) == (made, 100)
    assert meter.of("other", symbols) == (0, 0)


def compile_in_place(module: nn.Module) -> None:
    """What `module.compile()` leaves behind, without waiting for a compiler."""
    module._compiled_call_impl = module._call_impl  # type: ignore[assignment]


@pytest.mark.parametrize("place", ["model", "block", "inside"])
def test_what_is_compiled_is_weighed_by_its_parameters(place: str) -> None:
    model = ToyDiT()
    block: Any = model.blocks[1]
    compile_in_place({"model": model, "block": block, "inside": block.qkv}[place])
    session = dit_accel.apply(model, POLICY)
    with torch.no_grad():
        run(session, 5)
    block_size = 4 * WIDTH * WIDTH
    total = BLOCKS * block_size + 3 * WIDTH
    assert session.stats.flops_source == "parameters"
    assert [(record.flops, record.flops_total) for record in session.stats.steps] == [
        (total, total),
        (total, total),
        (total - 3 * block_size, total),
    ]


def test_compiling_after_apply_is_noticed() -> None:
    session = dit_accel.apply(ToyDiT(), POLICY)
    compile_in_place(session.target)
    with torch.no_grad():
        run(session, 5)
    assert session.stats.flops_source == "parameters"


def test_attention_that_compiles_itself_hides() -> None:
    model: Any = ToyDiT()
    assert not hides_from_counters(model)
    model.blocks[2].processor = SimpleNamespace(_attention_backend=SimpleNamespace(value="flex"))
    assert hides_from_counters(model)


@pytest.mark.parametrize(("word", "hides"), [("flex" + "_attention", True), ("attention", False)])
def test_attention_that_compiles_itself_is_known_by_its_file(
    word: str, hides: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / f"processor_of_{hides}.py"
    path.write_text(f"class Processor:\n    name = '{word}'\n")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, path.stem, module)
    spec.loader.exec_module(module)
    model: Any = ToyDiT()
    model.blocks[0].processor = module.Processor()
    assert hides_from_counters(model) is hides
