"""Circumstances of numbers: dtypes, and quantizers other than ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dit_accel.testing.composition.circumstance import Circumstance, Enter, Setting


def dtype(kind: torch.dtype) -> Enter:
    """The whole pipeline, and what a call gives it."""

    def enter(setting: Setting) -> None:
        setting.pipe.to(kind)
        given = setting.tiny.arguments.items()
        setting.arguments |= {
            name: value.to(kind)
            for name, value in given
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }

    return enter


def reloaded(config: Callable[[], Any]) -> Enter:
    """The transformer, saved and loaded by a quantizer of diffusers."""

    def enter(setting: Setting) -> None:
        folder = setting.undo.enter_context(tempfile.TemporaryDirectory())
        dense = setting.pipe.transformer
        dense.save_pretrained(folder)
        loaded = type(dense).from_pretrained(folder, quantization_config=config())
        setting.pipe.transformer = loaded.eval().requires_grad_(False)

    return enter


def torchao_config() -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def sdnq_config() -> Any:
    from sdnq import SDNQConfig

    return SDNQConfig(weights_dtype="int8", minimum_numel=0)


def gguf(setting: Setting) -> None:
    """Linear layers of the blocks in Q8_0, as diffusers holds them after reading a GGUF file."""
    import gguf as reader
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = reader.GGMLQuantizationType.Q8_0

    def convert(parent: nn.Module) -> None:
        for name, child in parent.named_children():
            if type(child) is not nn.Linear:
                convert(child)
            elif child.in_features % 32 == 0:
                layer = GGUFLinear(child.in_features, child.out_features, child.bias is not None, torch.float32)
                packed = torch.from_numpy(reader.quantize(child.weight.numpy(), kind))
                layer.weight = GGUFParameter(packed, quant_type=kind)
                layer.bias = child.bias
                setattr(parent, name, layer)

    with torch.no_grad():
        for denoiser in setting.denoisers:
            for block in [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]:
                convert(block)


_TAKEN = dict.fromkeys(("weights", "all"), "quantised by another method")
_NONE_LEFT = dict.fromkeys(("weights", "all"), "nothing can be quantised")

CIRCUMSTANCES = (
    Circumstance("bfloat16", dtype(torch.bfloat16), ("flux", "wan"), changes=True),
    Circumstance("float16", dtype(torch.float16), ("flux",), changes=True),
    Circumstance(
        "apply, then pipe.to(bfloat16)",
        dtype(torch.bfloat16),
        ("flux", "sd3"),
        after=True,
        changes=True,
        refused=dict.fromkeys(("weights", "all"), "Casting a quantized model to a new `dtype` is unsupported"),
    ),
    Circumstance("torchao int8", reloaded(torchao_config), changes=True, refused=_TAKEN, needs="torchao"),
    Circumstance("SDNQ int8", reloaded(sdnq_config), changes=True, refused=_TAKEN, needs="sdnq"),
    Circumstance("GGUF Q8_0", gguf, changes=True, refused=_NONE_LEFT),
)
