"""Circumstances of LoRA: loaded before and after, changed while a run goes on, swapped, fused, several and scaled."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from dit_accel.testing import tiny_pipelines
from dit_accel.testing.composition.circumstance import BLOCKS, Circumstance, Setting, both_ways

_TARGETS = {"flux": ["to_q", "to_k", "to_out.0", "proj_mlp"], "wan": ["to_q", "to_k", "to_out.0", "net.0.proj"]}


@functools.cache
def lora(pipeline: str, seed: int) -> dict[str, Tensor]:
    """A LoRA of a tiny pipeline, as a file would hold it."""
    donor: Any = tiny_pipelines.build(pipeline, blocks=BLOCKS).pipe.components["transformer"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        donor.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=_TARGETS[pipeline], init_lora_weights=False))
    return {f"transformer.{name}": 3 * value for name, value in get_peft_model_state_dict(donor).items()}


def load(setting: Setting, name: str = "style", seed: int = 1, **options: Any) -> None:
    setting.pipe.load_lora_weights(dict(lora(setting.tiny.name, seed)), adapter_name=name, **options)


def scaled(setting: Setting) -> None:
    load(setting)
    setting.pipe.set_adapters(["style"], [0.5])


def several(setting: Setting) -> None:
    load(setting)
    load(setting, "subject", 2)
    setting.pipe.set_adapters(["style", "subject"], [0.7, 0.4])


def called_then_loaded(setting: Setting) -> None:
    """Between two calls."""
    setting.call()
    load(setting)


def called_then_swapped(setting: Setting) -> None:
    """Another LoRA is put in the place of the first, without taking that out."""
    load(setting)
    setting.call()
    load(setting, seed=2, hotswap=True)


def disabled(setting: Setting) -> None:
    load(setting)
    setting.call()
    setting.pipe.disable_lora()


def unloaded(setting: Setting) -> None:
    load(setting)
    setting.call()
    setting.pipe.unload_lora_weights()


def fused(setting: Setting) -> None:
    load(setting)
    setting.pipe.fuse_lora(lora_scale=0.5)


def unfused(setting: Setting) -> None:
    fused(setting)
    setting.call()
    setting.pipe.unfuse_lora()


def switched_during(setting: Setting) -> None:
    """The scale changes while a run goes on, and goes back at its end."""
    load(setting)
    setting.steps = 10

    def switch(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del time
        if step in (2, 9):
            pipe.set_adapters(["style"], [0.1 if step == 2 else 1.0])
        return tensors

    setting.arguments["callback_on_step_end"] = switch


_FUSED = dict.fromkeys(("weights", "all"), "a LoRA cannot be fused into it")

CIRCUMSTANCES = (
    *both_ways("load a LoRA", load, pipelines=("flux", "wan"), changes=True),
    *both_ways("scale a LoRA", scaled, changes=True),
    *both_ways("load two scaled LoRAs", several, changes=True),
    Circumstance("apply, call, then load a LoRA", called_then_loaded, after=True, changes=True),
    *both_ways("hot-swap a LoRA", called_then_swapped, changes=True),
    Circumstance("apply, load, call, then disable LoRA", disabled, after=True, changes=True),
    *both_ways("load and unload a LoRA", unloaded),
    Circumstance("fuse a LoRA, then apply", fused, changes=True),
    Circumstance("apply, then fuse a LoRA", fused, after=True, changes=True, refused=_FUSED),
    Circumstance("fuse and unfuse a LoRA, then apply", unfused, changes=True),
    Circumstance("apply, then fuse and unfuse a LoRA", unfused, after=True, changes=True, refused=_FUSED),
    Circumstance("switch the scale during a run", switched_during, changes=True),
)
