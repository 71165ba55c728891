"""Bits where they matter, and a tuning of the whole: budgets are kept, errors fall, calls are joined where they may."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from dit_accel import PolicyError, VectorQuant
from dit_accel.denoiser.samples import stacked
from dit_accel.denoiser.whole import tensors_in
from dit_accel.quantization.allocate import ERRORS, allocate, spend
from dit_accel.quantization.collect import Call, can_be_joined, collect_calls, joined
from dit_accel.quantization.plan import plan
from dit_accel.quantization.quantize import quantize
from dit_accel.testing import tiny_pipelines
from dit_accel.weights.codebook import universal
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.vector_quant import Calibrate

RUNS = Calibrate(runs=2, steps=4, calls=8, sweeps=1)


def bytes_of(formats: dict[str, LayerFormat]) -> int:
    return sum(made.nbytes() for made in formats.values())


@pytest.mark.parametrize("size", ERRORS)
def test_the_known_errors_are_those_of_the_codebooks(size: str) -> None:
    from dit_accel.weights.codebook import nearest

    book = universal(size)[0]
    x = torch.randn(60_000, book.shape[1], generator=torch.Generator().manual_seed(0))
    error = float((x - book[nearest(x, book)]).square().mean())
    assert error == pytest.approx(ERRORS[size], rel=0.03)


def test_bytes_go_where_the_gain_is_largest() -> None:
    formats = {name: LayerFormat((64, 64), "256x4") for name in "abcd"}
    worth = {"a": 1.0, "b": 10.0, "c": 0.1, "d": 2.0}
    step = LayerFormat((64, 64), "64x2").nbytes() - formats["a"].nbytes()
    assert spend(formats, worth, 0.0) == formats
    one = spend(formats, worth, step)
    assert {name: made.codebook for name, made in one.items()} == dict(a="256x4", b="64x2", c="256x4", d="256x4")
    two = spend(formats, worth, 2 * step + 1)
    assert two["b"].codebook == "256x2", "32 % of the error of b is still more than all of d"
    everything = spend(formats, worth, 1e9)
    assert {made.codebook for made in everything.values()} == {"256x2"}


@pytest.fixture(scope="module")
def calls() -> tuple[Any, list[Call]]:
    torch.set_num_threads(1)
    tiny = tiny_pipelines.build("flux", 4)
    arguments = {name: value for name, value in tiny.arguments.items() if name not in ("prompt", "output_type")}
    found = collect_calls(tiny.pipe, {"transformer": tiny.pipe.transformer}, RUNS, arguments=arguments)
    return tiny, found["transformer"]


@pytest.mark.parametrize("bits", [2.9, 3.5, 4.2])
def test_the_budget_is_kept_and_used(calls: tuple[Any, list[Call]], bits: float) -> None:
    tiny, kept = calls
    model = tiny.pipe.transformer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = VectorQuant(mean_bits=bits, smallest=0, calibrate=RUNS)
    planned = plan(model, settings)
    made = allocate(model, planned, kept, settings, lambda *_: None)
    weights = sum(format.shape[0] * format.shape[1] for format in made.values())
    assert made.keys() == planned.keys()
    assert bits - 0.1 < 8 * bytes_of(made) / weights <= bits or {m.codebook for m in made.values()} == {"256x2"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_few_bits_are_refused(calls: tuple[Any, list[Call]]) -> None:
    tiny, kept = calls
    settings = VectorQuant(mean_bits=2.0, smallest=0, calibrate=RUNS)
    with pytest.raises(PolicyError, match="give more"):
        allocate(tiny.pipe.transformer, plan(tiny.pipe.transformer, settings), kept, settings, lambda *_: None)
    with pytest.raises(PolicyError, match="mean_bits and size"):
        VectorQuant(mean_bits=3.0, size="64x2")


def test_calls_are_joined_where_rows_are_independent(calls: tuple[Any, list[Call]]) -> None:
    tiny, kept = calls
    assert can_be_joined(tiny.pipe.transformer, kept[:4])
    whole = joined(kept[:4])
    with torch.no_grad():
        made = tensors_in(tiny.pipe.transformer(*whole.args, **whole.kwargs))[0]
    assert made.shape[0] == 4 * kept[0].output[0].shape[0]
    torch.testing.assert_close(made, whole.output[0], rtol=1e-4, atol=1e-5)

    class Mixing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    mixing = Mixing()
    rows = [torch.randn(2, 3, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    assert not can_be_joined(mixing, [Call((x,), {}, (mixing(x),), 0, 0) for x in rows])


def test_arguments_without_rows_must_agree() -> None:
    ids = torch.arange(6).view(3, 2)
    x = [torch.zeros(1, 3), torch.ones(1, 3)]
    made = stacked([{"x": value, "img_ids": ids, "scale": 2.0} for value in x], 1)
    assert made["x"].tolist() == [[0.0] * 3, [1.0] * 3] and made["img_ids"] is ids and made["scale"] == 2.0
    with pytest.raises(ValueError, match="scale"):
        stacked([{"scale": 1.0}, {"scale": 2.0}], 1)


@pytest.mark.parametrize("codebook", ["model", "layer"])
def test_tuning_lowers_the_error_of_the_outputs(codebook: str) -> None:
    torch.set_num_threads(1)
    errors = {}
    for steps in (0, 60):
        tiny = tiny_pipelines.build("flux", 4)
        model = tiny.pipe.transformer
        arguments = {name: value for name, value in tiny.arguments.items() if name not in ("prompt", "output_type")}
        calibrate = Calibrate(runs=2, steps=4, calls=8, sweeps=1, tuning=steps, rate=5e-3)
        size = "16x4" if codebook == "layer" else None
        settings = VectorQuant(smallest=0, codebook=codebook, size=size, method="feedback", calibrate=calibrate)
        kept = collect_calls(tiny.pipe, {"transformer": model}, calibrate, arguments=arguments)["transformer"]
        with contextlib.ExitStack() as undo, torch.no_grad():
            with torch.enable_grad():
                quantize(tiny.pipe, settings, undo, arguments=arguments)
            errors[steps] = sum(
                float((tensors_in(model(*c.args, **c.kwargs))[0] - c.output[0]).square().sum()) for c in kept
            )
    assert errors[60] < 0.8 * errors[0], errors
