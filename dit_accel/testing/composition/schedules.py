"""Circumstances of sampling: schedulers of flow matching and of noise prediction, numbers of steps, sigmas of one's
own."""

from __future__ import annotations

from typing import Any

import diffusers

from dit_accel.testing.composition.circumstance import Circumstance, Enter, Setting
from dit_accel.testing.tiny_components import MILD_NOISE, MILD_NOISE_UNCLIPPED


def scheduler(kind: str, steps: int | None = None, **options: Any) -> Enter:
    """Another scheduler. steps: of the call."""

    def enter(setting: Setting) -> None:
        setting.pipe.scheduler = getattr(diffusers, kind)(**options)
        setting.steps = steps or setting.steps

    return enter


def steps(count: int) -> Enter:
    def enter(setting: Setting) -> None:
        setting.steps = count

    return enter


def own_sigmas(setting: Setting) -> None:
    setting.arguments["sigmas"] = [1.0, 0.9, 0.75, 0.5, 0.25, 0.1]


_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
_FLOWING = ("sd3",)
_NOISY = ("pixart_sigma",)

CIRCUMSTANCES = (
    Circumstance(
        "flow-match Euler, shifted", scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0), _FLOWING, changes=True
    ),
    Circumstance(
        "flow-match Euler, stochastic",
        scheduler("FlowMatchEulerDiscreteScheduler", stochastic_sampling=True),
        _FLOWING,
        changes=True,
    ),
    Circumstance("flow-match Heun", scheduler("FlowMatchHeunDiscreteScheduler"), _FLOWING, changes=True),
    Circumstance("flow-match LCM", scheduler("FlowMatchLCMScheduler"), _FLOWING, changes=True),
    Circumstance("DPM-Solver++ on flow", scheduler("DPMSolverMultistepScheduler", **_FLOW), _FLOWING, changes=True),
    Circumstance(
        "DPM-Solver++, stochastic, on flow",
        scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", **_FLOW),
        _FLOWING,
        changes=True,
    ),
    Circumstance("UniPC on flow", scheduler("UniPCMultistepScheduler", **_FLOW), _FLOWING, changes=True),
    Circumstance("sigmas of one's own", own_sigmas, ("flux", "sd3"), changes=True),
    Circumstance("DDIM", scheduler("DDIMScheduler", **MILD_NOISE_UNCLIPPED), _NOISY, changes=True),
    Circumstance("DDPM", scheduler("DDPMScheduler", **MILD_NOISE_UNCLIPPED), _NOISY, changes=True),
    Circumstance("DPM-Solver++", scheduler("DPMSolverMultistepScheduler", **MILD_NOISE), _NOISY, changes=True),
    Circumstance("Heun", scheduler("HeunDiscreteScheduler", **MILD_NOISE), _NOISY, changes=True),
    Circumstance("Euler, ancestral", scheduler("EulerAncestralDiscreteScheduler", **MILD_NOISE), _NOISY, changes=True),
    Circumstance(
        "LCM", scheduler("LCMScheduler", **MILD_NOISE_UNCLIPPED, original_inference_steps=50), _NOISY, changes=True
    ),
    Circumstance("UniPC", scheduler("UniPCMultistepScheduler", **MILD_NOISE), _NOISY, changes=True),
    Circumstance("4 steps", steps(4), ("sd3",), changes=True),
    Circumstance("20 steps", steps(20), ("flux",), changes=True),
    Circumstance("100 steps", steps(100), ("dit",), changes=True, slow=True),
)
