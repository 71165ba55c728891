"""Loading with a VQConfig, saving and loading again: the same bits, whichever way."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, PipelineQuantizationConfig
from safetensors.torch import load_file
from torch import Tensor, nn

import dit_accel
from dit_accel import VectorQuant, VQConfig
from dit_accel.errors import ArgumentError
from dit_accel.quantization import install
from dit_accel.quantization.checkpoint import check
from dit_accel.quantization.install import add_codebooks, coded_like, encode_layer, put
from dit_accel.quantization.mark import mark_quantised
from dit_accel.quantization.plan import plan
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.tiny_transformers import CASES, build
from dit_accel.weights.codebook import universal
from dit_accel.weights.encode import data_free
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.linear import VQLinear
from dit_accel.weights.storage import store

FLUX = "FluxTransformer2DModel"
SMALL = VQConfig(smallest=0)


def output(model: Any) -> Tensor:
    """The first output, flattened; inputs are cast to the model's dtype."""
    inputs = CASES[FLUX].inputs(model, 0, 0.5)
    cast = {
        key: v.to(model.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in inputs.items()
    }
    with torch.no_grad():
        return model(**cast, return_dict=False)[0].flatten()


def load(folder: Path, **options: Any) -> Any:
    return FluxTransformer2DModel.from_pretrained(folder, **options)


def same_state(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def quantise(model: nn.Module, settings: VectorQuant) -> dict[str, LayerFormat]:
    """What a policy does in memory."""
    formats = plan(model, settings)
    books = add_codebooks(model, formats, dtype=next(model.parameters()).dtype)
    for name, made in formats.items():
        layer: Any = model.get_submodule(name)
        coded = coded_like(layer, made, books)
        book = universal(made.codebook) if made.source == "shared" else None
        coded.load(encode_layer(name, layer.weight.detach(), made, settings.seed, book))
        put(model, name, coded)
    return formats


# ---------------------------------------------------------------------------------------------------- quantise on load


def test_loading_quantises_as_a_policy_does_in_memory(dense: Path) -> None:
    loaded, made = load(dense, quantization_config=SMALL), load(dense)
    formats = quantise(made, SMALL.settings)
    assert same_state(loaded.state_dict(), made.state_dict())
    assert torch.equal(output(loaded), output(made))
    assert sum(isinstance(layer, VQLinear) for layer in loaded.modules()) == len(formats)
    assert not loaded.training


def test_settings_are_followed(dense: Path) -> None:
    config = VQConfig(smallest=0, keep_first=1, modules_to_not_convert="to_q", low_rank=3, scratch_mb=2.0, bits=3)
    model = load(dense, quantization_config=config)
    kinds = {name: layer for name, layer in model.named_modules() if isinstance(layer, VQLinear)}
    assert all(".0." not in f"{name}."[: len("transformer_blocks.0.")] and "to_q" not in name for name in kinds)
    assert {layer.scratch_mb for layer in kinds.values()} == {2.0}
    assert kinds["single_transformer_blocks.1.proj_mlp"].format == LayerFormat((128, 32), "64x2", block=32, rank=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dense: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    loaded, made = load(dense, quantization_config=SMALL, torch_dtype=dtype), load(dense, torch_dtype=dtype)
    quantise(made, SMALL.settings)
    assert same_state(loaded.state_dict(), made.state_dict())
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.uint8, dtype}
    loaded.save_pretrained(tmp_path)
    assert same_state(loaded.state_dict(), load(tmp_path, torch_dtype=dtype).state_dict())
    assert output(loaded.to("cpu")).isfinite().all()


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_device_maps(dense: Path, shared: Path, device_map: Any) -> None:
    quantised, again = (
        load(dense, quantization_config=SMALL, device_map=device_map),
        load(shared, device_map=device_map),
    )
    assert torch.equal(output(quantised), output(load(shared)))
    assert torch.equal(output(again), output(quantised))


def test_shards_of_dense_weights(dense: Path, shared: Path, tmp_path: Path) -> None:
    load(dense).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(output(load(tmp_path, quantization_config=SMALL)), output(load(shared)))


@pytest.mark.parametrize("options", [{"device_map": {"": "disk"}}, {"torch_dtype": torch.float64}])
def test_what_cannot_be_loaded_is_refused(dense: Path, shared: Path, tmp_path: Path, options: Any) -> None:
    for folder in (dense, shared):
        with pytest.raises(ArgumentError):
            load(folder, quantization_config=SMALL, offload_folder=tmp_path, **options)


def test_dense_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = build(FLUX, 4)
    with torch.no_grad():
        model.get_parameter("transformer_blocks.0.attn.to_k.weight")[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(dit_accel.CheckpointError, match=r"transformer_blocks\.0\.attn\.to_k cannot be quantised"):
        load(tmp_path, quantization_config=SMALL)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "PixArtTransformer2DModel", "DiTTransformer2DModel"])
def test_modules_that_are_kept_in_float32_stay_so(tmp_path: Path, name: str) -> None:
    kind = getattr(diffusers, name)
    build(name, 4).save_pretrained(tmp_path / "dense")
    options = {"torch_dtype": torch.bfloat16}
    plain = kind.from_pretrained(tmp_path / "dense", **options)
    model = kind.from_pretrained(tmp_path / "dense", quantization_config=SMALL, **options)
    kept = {key: tensor.dtype for key, tensor in plain.state_dict().items()}
    assert all(kept[key] == tensor.dtype for key, tensor in model.state_dict().items() if key in kept)
    assert name != "WanTransformer3DModel" or torch.float32 in kept.values()
    model.save_pretrained(tmp_path / "quantised")
    again = kind.from_pretrained(tmp_path / "quantised", **options)
    assert same_state(model.state_dict(), again.state_dict())


# ----------------------------------------------------------------------------------------------------- save and reload


@pytest.mark.parametrize("which", ["shared", "own"])
def test_a_reloaded_model_is_the_same(dense: Path, which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    data = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert data["codebook"] == ("layer" if which == "own" else "universal")
    model = load(dense, quantization_config=VQConfig.from_dict(data | {"layers": None}))
    again, info = load(folder, output_loading_info=True)
    assert same_state(model.state_dict(), again.state_dict())
    assert torch.equal(output(model), output(again))
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(output(dit_accel.load_model(folder)), output(again))
    assert check(folder).config == again.config.quantization_config


def test_files_are_smaller_and_are_what_the_format_says(dense: Path, shared: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    assert (shared / name).stat().st_size < 0.6 * (dense / name).stat().st_size  # embedders stay dense, scales are fp32
    tensors, config = load_file(shared / name), check(shared).config
    for layer, made in config.layers.items():
        for part, (shape, holds_bytes) in made.tensors().items():
            assert tensors[f"{layer}.{part}"].shape == shape
            assert (tensors[f"{layer}.{part}"].dtype == torch.uint8) == holds_bytes


def test_shards_of_quantised_weights(shared: Path, tmp_path: Path) -> None:
    model = load(shared)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert len(check(tmp_path).entries) == len(model.state_dict())
    assert torch.equal(output(load(tmp_path)), output(model))


def test_parallel_loading(shared: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(shared)
    model.save_pretrained(tmp_path / "quantised", max_shard_size="100KB")
    load(dense).save_pretrained(tmp_path / "dense", max_shard_size="200KB")
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    assert torch.equal(output(load(tmp_path / "quantised")), output(model))
    assert torch.equal(output(load(tmp_path / "dense", quantization_config=SMALL)), output(model))


def test_variants(shared: Path, tmp_path: Path) -> None:
    load(shared).save_pretrained(tmp_path, variant="fp16")
    assert torch.equal(output(dit_accel.load_model(tmp_path, variant="fp16")), output(load(shared)))
    assert torch.equal(output(load(tmp_path, variant="fp16")), output(load(shared)))


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_a_fresh_process_reads_it_by_one_import(shared: Path) -> None:
    code = f"""if True:
        from diffusers import FluxTransformer2DModel
        try:
            FluxTransformer2DModel.from_pretrained({str(shared)!r})
        except ValueError as error:
            assert "Unknown quantization type, got dit_accel_vq" in str(error), error
        else:
            raise AssertionError
        import torch
        torch.set_num_threads(1)
        from dit_accel import VQConfig
        from dit_accel.testing.tiny_transformers import forward
        model = FluxTransformer2DModel.from_pretrained({str(shared)!r})
        print(forward(model, "{FLUX}", 0.5).numpy().tobytes().hex())
    """
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == output(load(shared)).numpy().tobytes().hex()


def test_a_model_that_was_quantised_in_memory_can_be_saved(dense: Path, tmp_path: Path) -> None:
    model, settings = load(dense), VectorQuant(smallest=0, method="feedback", codebook="layer", size="32x4")
    mark_quantised(model, settings, quantise(model, settings))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same_state(model.state_dict(), again.state_dict())
    assert torch.equal(output(model), output(again))
    assert again.config.quantization_config.settings == settings
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(output(model), output(dit_accel.load_model(tmp_path / "again")))


# ------------------------------------------------------------------------------------------------- afterwards


def test_dequantize_gives_a_plain_dense_model(shared: Path, tmp_path: Path) -> None:
    model, untouched = load(shared), load(shared)
    before = output(model)
    plain = model.dequantize()
    assert plain is model
    assert not any(isinstance(layer, VQLinear) for layer in model.modules())
    assert not hasattr(model, "hf_quantizer") and not hasattr(model, "vq_codebooks")
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-5)  # products in another order
    layer = "transformer_blocks.0.attn.to_q"
    assert torch.equal(model.get_submodule(layer).weight, untouched.get_submodule(layer).weight.data)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(output(load(tmp_path)), output(model))
    model.to(torch.bfloat16)


def test_a_copy_is_on_its_own(shared: Path) -> None:
    model = load(shared)
    before, copied = output(model), copy.deepcopy(model)
    assert torch.equal(output(copied), before)
    copied.vq_codebooks.book("256x4").zero_()
    assert not torch.equal(output(copied), before)
    assert torch.equal(output(model), before)


def test_a_cast_of_the_whole_model_is_refused_by_diffusers(shared: Path) -> None:
    with pytest.raises(ValueError, match="Casting a quantized model"):
        load(shared).to(torch.bfloat16)


def test_pickles_are_not_written(shared: Path, tmp_path: Path) -> None:
    with pytest.raises((ArgumentError, ValueError), match="safetensors"):
        load(shared).save_pretrained(tmp_path, safe_serialization=False)


# ----------------------------------------------------------------------------------------------------------- pipelines


def run(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe(**arguments, num_inference_steps=2, generator=generator).images)


@pytest.mark.parametrize("given", ["mapping", "backend"])
def test_pipelines_are_quantised_while_loaded_saved_and_loaded(tmp_path: Path, given: str) -> None:
    tiny = tiny_pipelines.build("flux")
    tiny.pipe.save_pretrained(tmp_path / "dense")
    config = (
        PipelineQuantizationConfig(quant_mapping={"transformer": SMALL})
        if given == "mapping"
        else PipelineQuantizationConfig("dit_accel_vq", {"smallest": 0}, components_to_quantize=["transformer"])
    )
    none = {name: None for name, part in tiny.pipe.components.items() if part is None}
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "dense", quantization_config=config, **none)
    assert any(isinstance(layer, VQLinear) for layer in pipe.transformer.modules())
    pipe.set_progress_bar_config(disable=True)
    image = run(pipe, tiny.arguments)
    pipe.save_pretrained(tmp_path / "quantised")
    again: Any = DiffusionPipeline.from_pretrained(tmp_path / "quantised", **none)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, tiny.arguments), image)
    model = dit_accel.load_model(tmp_path / "quantised")
    assert same_state(model.state_dict(), pipe.transformer.state_dict())


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("shape", [(400, 3072), (4096, 96), (70, 160)])
def test_rows_that_are_taken_some_at_a_time_get_the_same_codes(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    format = LayerFormat(shape, block=32, bias=False)
    book = universal("256x4")
    signs = install.rotation_of("layer", format, 0)
    whole = store(data_free(install.rotated(weight, format, signs), book), signs=signs, block=32)
    for at_once in (2**20, 2**17, 1):
        monkeypatch.setattr(install, "_AT_ONCE", at_once)
        made = encode_layer("layer", weight, format, 0, book)
        assert torch.equal(made.codes, whole.codes)
        assert torch.equal(made.row_scale, whole.row_scale)


def test_a_low_rank_part_lowers_the_error() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    errors = []
    for rank in (0, 4, 16):
        made = encode_layer("layer", weight, LayerFormat((96, 64), block=64, rank=rank), 0, universal("256x4"))
        errors.append(float((weight - made.decode()).norm() / weight.norm()))
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2] > 0
