"""Mark a model that was quantised in memory as quantised, for diffusers to save it; and back, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_accel.diffusers_bridge import answer_for_weights, forget_config
from dit_accel.errors import UnsupportedModelError
from dit_accel.quantization.config import VQConfig
from dit_accel.quantization.install import put, remove_codebooks
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.linear import VQEmbedding, VQLinear
from dit_accel.weights.vector_quant import VectorQuant

_SIGNS = ("hf_quantizer", "is_quantized", "quantization_method")  # attributes that diffusers gives quantised models


def mark_quantised(model: Any, settings: VectorQuant, formats: Mapping[str, LayerFormat]) -> None:
    """Say in the model's config and to diffusers that these layers are quantised, so that save_pretrained and
    dequantize() work. A module that is no model of diffusers has no config, and stays as it is.

    Raises UnsupportedModelError where the model is quantised by somebody else.
    """
    from dit_accel.quantization.quantizer import VQQuantizer, register

    if not hasattr(model, "register_to_config"):
        return
    register()
    there = model.config.get("quantization_config") or getattr(model, "hf_quantizer", None)
    if there is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantised already, by {type(there).__name__}; load or dequantize() it first."
        )
    quantizer = VQQuantizer(VQConfig.of(settings, formats), pre_quantized=True)
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.register_to_config(quantization_config=quantizer.quantization_config)
    answer_for_weights(model)


def unmark(model: Any) -> None:
    """The inverse of `mark_quantised`."""
    for name in _SIGNS:
        vars(model).pop(name, None)
    forget_config(model, "quantization_config")
    answer_for_weights(model, False)


def densify(model: nn.Module) -> None:
    """Plain dense layers in the place of all quantised ones, with the same biases; the shared codebooks go."""
    coded = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (VQLinear, VQEmbedding))]
    for name, layer in coded:
        put(model, name, _dense(layer))
    remove_codebooks(model)


def _dense(layer: VQLinear | VQEmbedding) -> nn.Module:
    outputs, inputs = layer.format.shape
    weight = nn.Parameter(layer.weight.data)
    made: nn.Module
    if isinstance(layer, VQEmbedding):
        made = nn.Embedding(outputs, inputs, padding_idx=layer.padding_idx, device="meta")
    else:
        made = nn.Linear(inputs, outputs, bias=layer.bias is not None, device="meta")
        made.bias = layer.bias
    made.weight = weight
    return made.train(layer.training)
