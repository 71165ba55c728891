"""VQConfig: the settings of VectorQuant as a quantization config of diffusers."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from dit_accel import CheckpointError, PolicyError, UnsupportedModelError, VectorQuant, VQConfig
from dit_accel.quantization.mark import mark_quantised, unmark
from dit_accel.quantization.plan import plan
from dit_accel.quantization.quantizer import VQQuantizer, register
from dit_accel.testing.tiny_transformers import build
from dit_accel.weights.format import LayerFormat

GIVEN = {
    "bits": 3, "modulation_bits": 2, "codebook": "layer", "size": "64x4", "rotate": False, "low_rank": 2,
    "keep_first": 1, "keep_last": 1, "modules_to_not_convert": ["to_q"], "smallest": 0, "scratch_mb": 8.0, "seed": 7,
}  # fmt: skip


def test_defaults_are_those_of_the_policy() -> None:
    assert VQConfig().settings == VectorQuant()


def test_every_setting_reaches_the_policy_by_its_name() -> None:
    settings = VQConfig(**GIVEN).settings
    assert settings.dense == ("to_q",)
    assert all(getattr(settings, name) == value for name, value in GIVEN.items() if name != "modules_to_not_convert")
    assert VQConfig.of(settings, {"blocks.0": LayerFormat((8, 8))}).settings == settings


def test_a_config_survives_a_file() -> None:
    config = VQConfig(**GIVEN, layers={"blocks.0.to_k": LayerFormat((8, 16), "64x4", "own", rank=2, bias=False)})
    data = json.loads(json.dumps(config.to_dict()))
    assert data["quant_method"] == "dit_accel_vq"
    assert data["format_version"] == 1
    again = VQConfig.from_dict(data)
    assert again == config
    assert again.layers == config.layers
    assert again != VQConfig()
    assert copy.deepcopy(config) == config
    assert dict(config) == config.to_dict()


def test_the_difference_from_the_defaults_is_shown() -> None:
    assert VQConfig().to_diff_dict() == {"quant_method": "dit_accel_vq"}
    assert json.loads(VQConfig(bits=3).to_json_string()) == {"quant_method": "dit_accel_vq", "bits": 3}
    assert repr(VQConfig(bits=3, layers={"a": LayerFormat((8, 8))})) == "VQConfig(bits=3, 1 layers)"


def test_one_name_of_a_dense_layer_may_be_given_as_text() -> None:
    assert VQConfig(modules_to_not_convert="proj").settings.dense == ("proj",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 5}, "bits is 5; give 2, 3 or 4"),
        ({"bits": "2"}, "bits is '2'"),
        ({"modulation_bits": 1}, "modulation_bits is 1"),
        ({"codebook": "univers"}, "universal"),
        ({"rotate": False}, "universal"),
        ({"low_rank": -1}, "low_rank"),
        ({"keep_first": 1.5}, "keep_first"),
        ({"modules_to_not_convert": [3]}, "dense"),
        ({"modules_to_not_convert": 3}, "dense"),
        ({"smallest": None}, "smallest"),
        ({"scratch_mb": 0.0}, "scratch_mb"),
        ({"seed": -1}, "seed"),
        ({"method": "gptq"}, "method"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        VQConfig(**given)
    with pytest.raises(CheckpointError, match=message):
        VQConfig.from_dict(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bit": 2}, "'bit'; format_version 1, which this version of dit_accel reads, has bits, codebook"),
        ({"format_version": 2}, "format_version 2, and this version of dit_accel reads 1"),
        ({"format_version": 2, "entropy": True}, "format_version 2"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"quant_method": "gguf"}, "quant_method is 'gguf'"),
        ({"layers": {}}, "The layers are {}"),
        ({"layers": {"a..b": {"shape": [8, 8]}}}, "'a..b'"),
        ({"layers": {"a": {"shape": [8]}}}, "The layer a cannot be read"),
        ({"layers": {"a": {"shape": [8, 8], "code": 1}}}, "The layer a cannot be read"),
        ([], "a mapping is expected"),
    ],
)
def test_dictionaries_of_another_kind_are_refused(given: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        VQConfig.from_dict(given)


def test_settings_beside_a_dictionary_take_its_place_and_others_come_back() -> None:
    config, unused = VQConfig.from_dict({"bits": 3}, return_unused_kwargs=True, seed=5, revision="main")
    assert (config.bits, config.seed, unused) == (3, 5, {"revision": "main"})


@pytest.mark.parametrize("given", [{"codebook": "model"}, {"method": "feedback"}, {"method": "vq4dit"}])
def test_what_needs_the_whole_pipeline_says_where_to_go(dense: Path, given: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r"dit-accel quantize.*Policy\(weights="):
        FluxTransformer2DModel.from_pretrained(dense, quantization_config=VQConfig(**given))


def test_layers_are_no_setting_of_dense_weights(dense: Path) -> None:
    config = VQConfig(layers={"a": LayerFormat((8, 8))})
    with pytest.raises(PolicyError, match=r"VQConfig\.layers"):
        FluxTransformer2DModel.from_pretrained(dense, quantization_config=config)


def test_the_config_that_was_given_stays_as_it_was(dense: Path) -> None:
    config = VQConfig(smallest=0)
    model = FluxTransformer2DModel.from_pretrained(dense, quantization_config=config)
    assert config == VQConfig(smallest=0)
    assert model.config.quantization_config.layers == plan(build(FluxTransformer2DModel.__name__, 4), config.settings)


def test_a_model_without_large_layers_is_refused(dense: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="lower smallest"):
        FluxTransformer2DModel.from_pretrained(dense, quantization_config=VQConfig(smallest=10**6))


def test_registering_twice_changes_nothing() -> None:
    register()
    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    register()
    assert before == (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert before[0]["dit_accel_vq"] is VQQuantizer


def test_a_mark_is_taken_back_exactly() -> None:
    model: Any = build("DiTTransformer2DModel", 4)
    attributes, config = set(vars(model)), dict(model.config)
    formats = plan(model, VectorQuant(smallest=0))
    mark_quantised(model, VectorQuant(smallest=0), formats)
    assert model.hf_quantizer.quantization_config.layers == formats
    assert json.loads(model.to_json_string())["quantization_config"]["smallest"] == 0
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        mark_quantised(model, VectorQuant(), formats)
    unmark(model)
    assert (set(vars(model)), dict(model.config)) == (attributes, config | {k: model.config[k] for k in _ADDED})
    assert "quantization_config" not in json.loads(model.to_json_string())


_ADDED = ("_class_name", "_diffusers_version")  # diffusers adds these to the config when it is made into text


def test_a_module_of_somebody_else_is_not_marked() -> None:
    module = torch.nn.Linear(4, 4)
    mark_quantised(module, VectorQuant(), {})
    unmark(module)
    assert not hasattr(module, "hf_quantizer")


def test_policies_and_configs_have_the_same_settings() -> None:
    ours = {field.name for field in dataclasses.fields(VectorQuant)} - {"dense", "calibrate", "keep", "mean_bits"}
    assert ours == set(VQConfig().to_dict()) - {"quant_method", "format_version", "layers", "modules_to_not_convert"}
