"""Circumstances of guidance: one branch after the other, in one batch, off, distilled; prompts of another length."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from dit_accel.testing.composition.circumstance import Circumstance, Enter, Setting
from dit_accel.testing.composition.control import as_it_is, ten_steps
from dit_accel.testing.tiny_components import TEXT_DIM, text_mask, text_states


def arguments(**given: object) -> Enter:
    def enter(setting: Setting) -> None:
        setting.arguments |= given

    return enter


def longer_negative(setting: Setting) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        setting.arguments["negative_prompt_embeds"] = text_states(TEXT_DIM, 12)
    if "negative_prompt_embeds_mask" in setting.tiny.arguments:
        setting.arguments["negative_prompt_embeds_mask"] = text_mask(12)


def two_prompts(setting: Setting) -> None:
    given = setting.tiny.arguments.items()
    setting.arguments |= {name: torch.cat([value, value.flip(-1)]) for name, value in given if "embeds" in name}


def guider(kind: str, **options: Any) -> Enter:
    """A guider in the place of the pipeline's own."""

    def enter(setting: Setting) -> None:
        setting.pipe.guider = getattr(diffusers, kind)(**options)

    return enter


def _layers(**options: Any) -> Any:
    return diffusers.LayerSkipConfig(indices=[1], fqn="transformer_blocks", **options)


CIRCUMSTANCES = (
    Circumstance("one branch after the other", as_it_is, ("flux_true_cfg", "wan", "qwenimage"), changes=True),
    Circumstance("both branches in one batch", as_it_is, ("sd3", "pixart_sigma", "cogvideox"), changes=True),
    Circumstance("off", arguments(guidance_scale=1.0), ("sd3", "wan"), changes=True),
    Circumstance("distilled into the model", arguments(guidance_scale=2.0), ("flux",), changes=True),
    Circumstance("a longer negative prompt", longer_negative, ("qwenimage", "wan"), changes=True),
    Circumstance("two prompts", two_prompts, ("flux_true_cfg", "sd3"), changes=True),
    Circumstance("two denoisers, each with its part of the steps", ten_steps, ("wan22",), changes=True),
    Circumstance("a modular pipeline", as_it_is, ("flux_modular",), changes=True),
    Circumstance("guider: adaptive projected, mixed", as_it_is, ("hunyuan_image",), changes=True),
    Circumstance("guider: classifier-free", guider("ClassifierFreeGuidance"), ("hunyuan_image",), changes=True),
    Circumstance(
        "guider: zero-init (CFG-Zero*)", guider("ClassifierFreeZeroStarGuidance"), ("hunyuan_image",), changes=True
    ),
    Circumstance(
        "guider: skipping layers",
        guider(
            "SkipLayerGuidance",
            skip_layer_config=_layers(),
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        ),
        ("hunyuan_image",),
        changes=True,
    ),
    Circumstance(
        "guider: perturbed attention",
        guider(
            "PerturbedAttentionGuidance",
            perturbed_guidance_config=_layers(skip_attention=False, skip_attention_scores=True, skip_ff=False),
            perturbed_guidance_start=0.0,
            perturbed_guidance_stop=1.0,
        ),
        ("hunyuan_image",),
        changes=True,
    ),
    Circumstance(
        "guider: auto-guidance",
        guider("AutoGuidance", auto_guidance_config=_layers(skip_attention=False, skip_ff=True, dropout=1.0)),
        ("hunyuan_image",),
        changes=True,
    ),
)
