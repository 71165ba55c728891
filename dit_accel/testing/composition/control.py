"""Circumstances of control and editing: ControlNet, IP-Adapter, images to begin with, masks, references."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.testing.composition.circumstance import Circumstance, Setting


def as_it_is(setting: Setting) -> None:
    """The pipeline is the circumstance."""


def ten_steps(setting: Setting) -> None:
    """The same, where a run has fewer steps than were asked for, or two denoisers share them."""
    setting.steps = 10


def controlled(scale: float) -> Any:
    def enter(setting: Setting) -> None:
        setting.arguments["controlnet_conditioning_scale"] = scale

    return enter


def control_that_ends(setting: Setting) -> None:
    """Residuals in the first half of the run only."""
    setting.arguments["control_guidance_end"] = 0.5


def strength(value: float) -> Any:
    def enter(setting: Setting) -> None:
        setting.arguments["strength"] = value
        setting.steps = 10

    return enter


def ip_adapter(setting: Setting) -> None:
    """An image prompt: its projection, and processors that attend to it in the double blocks."""
    transformer = setting.pipe.transformer
    text, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layers = {
            f"{number}.{kind}_ip.{part}": torch.randn((inner, text) if part == "weight" else (inner,))
            for number in range(transformer.config.num_layers)
            for kind in ("to_k", "to_v")
            for part in ("weight", "bias")
        }
        image = {
            "proj.weight": torch.randn(4 * text, 8),
            "proj.bias": torch.randn(4 * text),
            "norm.weight": torch.randn(text),
            "norm.bias": torch.randn(text),
        }
        embeds = torch.randn(1, 1, 8)
    transformer._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": layers}], low_cpu_mem_usage=False)
    setting.arguments |= {
        "ip_adapter_image_embeds": [embeds],
        "negative_ip_adapter_image_embeds": [torch.zeros_like(embeds)],
    }


CIRCUMSTANCES = (
    Circumstance("ControlNet", controlled(1.0), ("sd3_controlnet", "flux_controlnet"), changes=True),
    Circumstance("ControlNet, twice as strong", controlled(2.0), ("sd3_controlnet",), changes=True),
    Circumstance("ControlNet that ends half-way", control_that_ends, ("flux_controlnet",), changes=True),
    Circumstance("IP-Adapter, then apply", ip_adapter, changes=True),
    Circumstance("apply, then IP-Adapter", ip_adapter, after=True, changes=True),
    Circumstance("image to image, strength 0.9", strength(0.9), ("flux_img2img", "qwenimage_img2img"), changes=True),
    Circumstance("image to image, strength 0.6", strength(0.6), ("sd3_img2img",), changes=True),
    Circumstance("video to video", ten_steps, ("cogvideox_v2v",), changes=True),
    Circumstance("image to video", as_it_is, ("wan_i2v", "ltx_i2v"), changes=True),
    Circumstance("inpainting", ten_steps, ("flux_inpaint",), changes=True),
    Circumstance("reference images (Kontext)", as_it_is, ("flux_kontext",), changes=True),
)
