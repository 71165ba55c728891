"""The weights bench: which layers it takes, what it measures of a method, ours in it, and a record that goes on."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_accel.bench import weights as module
from dit_accel.bench.weight_ours import OURS, Quantised, denoiser_of, quantisable
from dit_accel.bench.weight_results import Row, family, recorded, table, write
from dit_accel.bench.weights import Bench, collect, load_bench, main, methods
from dit_accel.errors import ArgumentError
from dit_accel.weights.hessian import output_error

FLUX = Path(__file__).parents[2] / "pipelines" / "tiny-flux"
ROW = Row("rtn-int2", 2.25, 1000, 2000, 11.5, 9.75, 20.0, 15.0, 3, 12.5, 20.0, 30.0, 40.0, 0.5, 1.25)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return load_bench(FLUX, items=2, steps=2, guidance=1.0, runs=1)


def test_layers_are_the_large_ones_in_blocks(bench: Bench) -> None:
    model = denoiser_of(bench.workload.pipe)
    layers = quantisable(model)
    assert layers == bench.layers and all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert all(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in layers)
    assert {tuple(layer.weight.shape) for layer in layers.values()} >= {(96, 96), (384, 96), (96, 384), (576, 96)}
    small = nn.Module()
    small.blocks = nn.ModuleList(nn.Linear(size, 64) for size in (64, 63))
    assert list(quantisable(small)) == ["blocks.0"]


def test_hessians_are_sums_over_all_tokens_and_calls(bench: Bench) -> None:
    name = "transformer_blocks.0.attn.to_q"
    seen: list[Tensor] = []
    handle = bench.layers[name].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        found = collect(bench.workload, bench.captions[:1], 5)
    finally:
        handle.remove()
    assert len(seen) == 2
    x = torch.cat([one.flatten(0, -2) for one in seen]).double()
    torch.testing.assert_close(found[name].double(), x.T @ x, rtol=1e-4, atol=1e-4 * float(x.square().sum(0).max()))
    assert set(found) == set(bench.layers) and all(float(h.trace()) > 0 for h in found.values())
    assert not torch.equal(bench.hessians[name], bench.unseen[name])


def test_a_method_is_measured_and_the_pipeline_stays_as_it_was(bench: Bench) -> None:
    before = {name: layer.weight.detach().clone() for name, layer in bench.layers.items()}
    known = methods()
    dense, half, four, two = (
        bench.measure(name, known[name]) for name in ("dense", "bfloat16", "rtn-int4", "rtn-int2")
    )
    assert all(torch.equal(layer.weight, before[name]) for name, layer in bench.layers.items())
    assert dense.psnr_mean == dense.psnr_worst == math.inf and dense.latent_l2_worst == dense.weight_error == 0
    assert dense.bits_per_weight == 32 and half.bits_per_weight == 16
    count = sum(weight.numel() for weight in before.values())
    assert dense.file_bytes - half.file_bytes == 2 * count and dense.layer_bytes == 4 * count
    assert dense.file_bytes == sum(4 * p.numel() for p in bench.model.parameters())
    assert 0 < half.weight_error < four.weight_error < two.weight_error and 0 < four.output_error < two.output_error
    assert half.psnr_mean > four.psnr_mean > two.psnr_mean >= two.psnr_worst
    assert two.latent_l2_mean <= two.latent_l2_worst and 0 <= two.captions <= 1
    assert 2 < two.bits_per_weight < 2.5


def test_layers_that_a_method_leaves_out_count_as_shipped(bench: Bench) -> None:
    name, layer = next(iter(bench.layers.items()))

    def only_one(pipe: Any, hessians: Mapping[str, Tensor]) -> Quantised:
        assert pipe is bench.workload.pipe and set(hessians) == set(bench.layers)
        return {name: (torch.zeros_like(layer.weight), 7)}

    row = bench.measure("one", only_one)
    total = sum(other.weight.numel() for other in bench.layers.values())
    assert row.layer_bytes == 4 * (total - layer.weight.numel()) + 7
    assert row.weight_error == pytest.approx(100 / len(bench.layers))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ours_keep_the_contract_and_data_helps(bench: Bench, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = dict(list(bench.layers.items())[:2])
    monkeypatch.setattr("dit_accel.bench.weight_ours.quantisable", lambda model: chosen)
    errors = {}
    for kind in ("k-means", "universal", "feedback", "feedback-own"):
        made = OURS[f"{kind}-{bits}"](bench.workload.pipe, bench.hessians)
        assert set(made) == set(chosen)
        for name, (dense, nbytes) in made.items():
            weight = chosen[name].weight.detach()
            assert dense.shape == weight.shape and dense.dtype == torch.float32
            assert bits < 8 * nbytes / weight.numel() < bits + (0.5 if kind in ("universal", "feedback") else 2)
            errors[kind] = errors.get(kind, 0.0) + output_error(weight, dense, bench.hessians[name])
    assert errors["feedback"] < errors["universal"] and errors["feedback-own"] < errors["k-means"]


def test_a_record_goes_on_where_it_was_interrupted(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(module, "load_bench", lambda *_: bench)
    asked: list[str] = []

    def measured(self: Bench, name: str, method: object) -> Row:
        asked.append(name)
        if name == "gptq-int2":
            raise RuntimeError("no such thing")
        return dataclasses.replace(ROW, method=name)

    monkeypatch.setattr(Bench, "measure", measured)
    call = [str(FLUX), "--steps", "2", "--out", str(tmp_path), "--methods"]
    assert main([*call, "rtn-int2", "gptq-int2"]) == 0
    assert main([*call, "rtn-int2", "universal-2"]) == 0
    assert asked == ["rtn-int2", "gptq-int2", "universal-2"]
    assert main([*call, "ours-2", "--tuning", "7"]) == 0  # how long ours learned is told row by row
    settings = {"items": 2, "steps": 2, "guidance": 1.0, "runs": 4}
    rows, left_out, calibration = recorded(tmp_path / "weights-guidance-1", settings)
    assert [row.method for row in rows] == ["rtn-int2", "universal-2", "ours-2"]
    assert calibration == {"ours-2": {"calls": 320, "tuning": 7}}
    assert left_out == {"gptq-int2": "RuntimeError: no such thing"}
    assert {p.suffix for p in tmp_path.iterdir()} == {".csv", ".json", ".md", ".png"}
    with pytest.raises(ArgumentError, match="--fresh"):
        main([*call, "rtn-int2", "--runs", "2"])
    assert main([*call, "rtn-int2", "--runs", "2", "--fresh"]) == 0
    assert asked[-1] == "rtn-int2" and len(asked) == 5
    with pytest.raises(ArgumentError, match="rtn-int2"):
        main([*call, "rtn-int"])
    capsys.readouterr()


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    settings = {"items": 4}
    plain = dataclasses.replace(ROW, method="dense", psnr_mean=math.inf, psnr_worst=math.inf, bits_per_weight=32.0)
    write(
        [plain, ROW],
        tmp_path / "x",
        {"settings": settings, "left_out": {"a": "b"}, "calibration": {"c": 1}},
        chart=False,
    )
    assert recorded(tmp_path / "x", settings) == ([plain, ROW], {"a": "b"}, {"c": 1})
    assert recorded(tmp_path / "y", settings) == ([], {}, {})
    assert "| rtn-int2 | 2.25 | 0.00 | 11.5 | 9.75 | 20.0 / 15.0 | 30.0 / 40.0 | 0.50 | 1.2 |" in table([plain, ROW])


def test_families_are_methods_without_their_bits() -> None:
    names = ["gguf-q2_k-imatrix", "torchao-hqq-int3", "sdnq-double-uint4", "k-means-2", "feedback-own-4", "dense"]
    assert [family(name) for name in names] == [
        "gguf-imatrix", "torchao-hqq", "sdnq-double", "k-means", "feedback-own", "dense"
    ]  # fmt: skip
    assert len({family(name) for name in OURS}) == 4 and len(methods()) == len(set(methods()))
