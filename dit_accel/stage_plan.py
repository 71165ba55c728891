"""Stage plan: whether a pipeline's call can be made in stages of rising resolution, and at which sizes."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

from torch import nn

from dit_accel.denoiser.clock import clean_estimate
from dit_accel.resolution import Progressive, Stage, plan

# Arguments that are pictures, or latents, of one size; the image of an adapter has none of its own.
_CONDITIONS = re.compile(r"(?!.*ip_adapter_)(.*_)?(images?|videos?|latents)|mask|conditions")
_ALLOWED = "Policy.resolution is for text-to-image and text-to-video pipelines that match flows"


def why_not(target: Any, progressive: Progressive | None) -> str | None:
    """Why a target cannot be run in stages, in a sentence; `None` where it can, as far as can be seen before a call."""
    from diffusers import DiffusionPipeline

    name = type(target).__name__
    if not isinstance(target, DiffusionPipeline):
        kind = "a bare model" if isinstance(target, nn.Module) else "a modular pipeline"
        return f"{name} is {kind}, whose runs cannot be divided into stages; {_ALLOWED}."
    parameters = inspect.signature(type(target).__call__).parameters
    if not {"height", "width"} <= parameters.keys() or not hasattr(target, "prepare_latents"):
        return f"{name} takes no height and width, or has no prepare_latents; {_ALLOWED}."
    needed = [
        key for key, p in parameters.items() if _CONDITIONS.fullmatch(key) and p.default is inspect.Parameter.empty
    ]
    more = [key for key in ("strength", "audio_latents") if key in parameters]
    if needed or more:
        return f"{name} takes {(needed or more)[0]}, which has a size or a noise level of its own; {_ALLOWED}."
    return _why_not_scheduler(getattr(target, "scheduler", None), progressive)


def _why_not_scheduler(scheduler: Any, progressive: Progressive | None) -> str | None:
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    flows = hasattr(scheduler, "set_timesteps") and clean_estimate(scheduler, 0.5) == (1.0, -0.5)
    ends_clean = config.get("final_sigmas_type", "zero") == "zero" and not config.get("invert_sigmas")
    if not flows or not ends_clean or getattr(scheduler, "order", 1) != 1:
        return (
            f"The scheduler {name} does not match flows from noise level 1 to 0 in one model call a step; {_ALLOWED}, "
            "such as with FlowMatchEulerDiscreteScheduler, or UniPCMultistepScheduler with use_flow_sigmas."
        )
    if (
        progressive is None
        or progressive.shifts is None
        or (hasattr(scheduler, "set_shift") and not config.get("use_dynamic_shifting"))
    ):
        return None
    why = "shifts by the number of tokens" if hasattr(scheduler, "set_shift") else "has no set_shift"
    return f"The scheduler {name} {why}, so Progressive.shifts would do nothing; leave it out."


def why_not_call(call: inspect.BoundArguments) -> str | None:
    """Why this call of a pipeline cannot be made in stages; `None` where it can."""
    given = [name for name, value in call.arguments.items() if value is not None and _CONDITIONS.fullmatch(name)]
    if given:
        return f"{given[0]} is given, which has the size of one stage only; {_ALLOWED}: leave it out."
    parameter = call.signature.parameters.get("use_resolution_binning")
    if parameter is not None and call.arguments.get("use_resolution_binning", parameter.default):
        return "use_resolution_binning is on, so the pipeline does not make the sizes asked for; turn it off."
    return None


def asked_size(pipe: Any, call: inspect.BoundArguments) -> tuple[int, int] | None:
    """Height and width of what a call makes, in pixels: as given, or the defaults; `None` where they are not known."""
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    cells = getattr(pipe, "default_sample_size", None) or config.get("sample_size")
    sides: list[int] = []
    for place, name in enumerate(("height", "width")):
        side = call.arguments.get(name) or call.signature.parameters[name].default
        if not isinstance(side, int):
            cell = cells[place] if isinstance(cells, (list, tuple)) and len(cells) == 2 else cells
            if not isinstance(cell, int):
                return None
            side = cell * pixels_per_latent(pipe)
        sides.append(side)
    return sides[0], sides[1]


def pixels_per_latent(pipe: Any) -> int:
    """How many pixels a side of a latent cell stands for; 1 where the pipeline names no factor."""
    names = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
    return next((value for name in names if isinstance(value := getattr(pipe, name, None), int)), 1)


def side_multiple(pipe: Any, denoisers: list[nn.Module]) -> int:
    """What height and width have to be a multiple of: the autoencoder's factor times the patch of every denoiser, and
    what the pipeline's image processor asks for."""
    factor = pixels_per_latent(pipe)
    multiple = factor
    for module in denoisers:
        patch = getattr(module, "config", {}).get("patch_size")
        patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
        multiple = math.lcm(multiple, factor * (patch if isinstance(patch, int) else 1))
    for name in ("image_processor", "video_processor"):
        own = getattr(getattr(pipe, name, None), "config", {}).get("vae_scale_factor")
        multiple = math.lcm(multiple, own if isinstance(own, int) else 1)
    return multiple


def accepted_plan(
    progressive: Progressive, size: tuple[int, int], multiple: int, call: inspect.BoundArguments
) -> tuple[list[Stage], list[str]]:
    """The plan with sizes that the pipeline's own check accepts; some ask for multiples of 16 whatever the model is."""
    first = plan(progressive, *size, multiple)
    if not _accepts(call, *size):
        return first  # the call itself is refused, which is for the pipeline to say
    for factor in (1, 2, 4, 8, 16):
        stages, sentences = plan(progressive, *size, factor * multiple)
        if all(_accepts(call, stage.height, stage.width) for stage in stages if stage.height and stage.width):
            return stages, sentences
    return first


def _accepts(call: inspect.BoundArguments, height: int, width: int) -> bool:
    """What `check_inputs` says, which every pipeline has: it takes arguments of the call by their names."""
    pipe, defaults = call.args[0], {name: p.default for name, p in call.signature.parameters.items()}
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return True
    values = defaults | call.arguments | {"height": height, "width": width}
    names = inspect.signature(check).parameters.keys() & values.keys()
    try:
        check(**{name: values[name] for name in names})
    except ValueError:
        return False
    except TypeError:  # it wants something else as well
        return True
    return True
