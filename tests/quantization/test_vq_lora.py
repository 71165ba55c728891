"""LoRAs on a quantised model: they add to it, come off it without a trace, and are not fused into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import dit_accel
from dit_accel import UnsupportedModelError, VQConfig
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.tiny_transformers import forward

FLUX = "FluxTransformer2DModel"
LORA = LoraConfig(
    r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "proj_mlp", "norm1.linear"], init_lora_weights=False
)


def output(model: Any) -> Tensor:
    return forward(model, FLUX, 0.5)


def add_lora(model: Any) -> None:
    torch.manual_seed(1)
    model.add_adapter(LORA)


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)  # products in another order


def test_a_lora_adds_what_it_adds_to_the_dequantised_model(shared: Path) -> None:
    model, plain = dit_accel.load_model(shared), dit_accel.load_model(shared).dequantize()
    before = output(model)
    add_lora(model)
    add_lora(plain)
    assert (output(model) - before).abs().max() > 0.01
    close(output(model), output(plain))
    model.set_adapters(["default"], weights=[0.5])
    plain.set_adapters(["default"], weights=[0.5])
    close(output(model), output(plain))
    model.disable_adapters()
    assert torch.equal(output(model), before)
    model.unload_lora()
    assert torch.equal(output(model), before)


def test_a_lora_is_not_fused_and_the_model_stays_usable(shared: Path) -> None:
    model = dit_accel.load_model(shared)
    before = output(model)
    add_lora(model)
    added = output(model)
    for safe in (False, True):
        with pytest.raises(UnsupportedModelError, match="a LoRA cannot be fused into it"):
            model.fuse_lora(safe_fusing=safe)
        assert torch.equal(output(model), added)
    model.unload_lora()
    assert torch.equal(output(model), before)


def test_a_model_with_a_lora_is_not_saved_as_what_it_is_not(shared: Path, tmp_path: Path) -> None:
    model = dit_accel.load_model(shared)
    add_lora(model)
    with pytest.raises(UnsupportedModelError, match="unload LoRAs before saving"):
        model.save_pretrained(tmp_path)


def test_a_model_with_a_lora_can_be_dequantised(shared: Path) -> None:
    model = dit_accel.load_model(shared)
    add_lora(model)
    before = output(model)
    close(output(model.dequantize()), before)
    model.fuse_lora()
    close(output(model), before)


def test_pipelines_load_and_unload_loras(tmp_path: Path) -> None:
    tiny = tiny_pipelines.build("flux")
    pipe: Any = tiny.pipe
    pipe.transformer.save_pretrained(tmp_path / "dense")
    pipe.transformer = dit_accel.load_model(tmp_path / "dense", quantization_config=VQConfig(smallest=0))

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(**tiny.arguments, num_inference_steps=1, generator=generator).images)

    pipe.set_progress_bar_config(disable=True)
    before = run()
    donor = dit_accel.load_model(tmp_path / "dense")
    add_lora(donor)
    weights = {f"transformer.{name}": value for name, value in get_peft_model_state_dict(donor).items()}
    pipe.load_lora_weights(weights, adapter_name="style")
    assert pipe.get_active_adapters() == ["style"]
    added = run()
    assert not torch.equal(added, before)
    with pytest.raises(UnsupportedModelError, match="a LoRA cannot be fused into it"):
        pipe.fuse_lora()
    assert torch.equal(run(), added)
    pipe.unload_lora_weights()
    assert torch.equal(run(), before)
