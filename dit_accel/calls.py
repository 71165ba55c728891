"""Calls: any diffusers pipeline in one way: a prompt or a class, a seed and a number of steps in, tensors out.

What a pipeline takes is read from the signature of its call and what it gives from the shape of the result; no pipeline
is known by name.
"""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel.diffusers_bridge import is_pipeline
from dit_accel.errors import ArgumentError, DitAccelError, nearest, shown
from dit_accel.quality import QualityError

OWN = {  # call arguments that are never given by hand -> what sets them
    "prompt": "`prompts`",
    "generator": "`seeds`",
    "num_inference_steps": "`steps`",
    "timesteps": "`steps`",
    "sigmas": "`steps`",
    "output_type": "dit_accel, which needs tensors",
    "return_dict": "dit_accel",
    "callback_on_step_end": "dit_accel, which reads the last latents",
}
# Arguments that mean classifier-free guidance, surest first: where a pipeline has both, `guidance_scale` is a number
# that the model itself takes in, in one call (FLUX, HunyuanVideo).
_GUIDANCE = ("true_cfg_scale", "guidance_scale")
_OUTPUTS = ("images", "videos")  # of modular pipelines


@dataclass(frozen=True)
class Made:
    """What one call made, on the CPU. pictures: images [N, C, H, W] or videos [N, F, C, H, W], float32 in [0, 1];
    latents: the final ones, `None` where the pipeline does not show them; seconds: of the whole call.
    """

    pictures: Tensor
    latents: Tensor | None
    seconds: float

    @property
    def is_video(self) -> bool:
        return self.pictures.ndim == 5

    @property
    def frames(self) -> Tensor:
        """Images, or the frames of all videos one after another: [M, C, H, W]."""
        return self.pictures.flatten(0, -4)


class Caller:
    """Calls one pipeline. arguments: call arguments besides prompt, seed and steps, by the pipeline's own names.

    Raises ArgumentError where an argument is set by us, or unknown to the pipeline.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any] | None = None):
        if not is_pipeline(pipe):
            raise ArgumentError(f"A call needs a pipeline, and got {type(pipe).__name__}; give a diffusers pipeline.")
        self.pipe, self.arguments = pipe, dict(arguments or {})
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        self.is_modular = "num_inference_steps" not in self.parameters
        self._output = self._modular_output() if self.is_modular else None
        self._output_type: str | None = None  # learned in the first call
        for name in self.arguments:
            if name in OWN:
                raise ArgumentError(f"The call argument {name!r} is set by {OWN[name]}; leave it out.")
            self._check_known(name)

    def make(self, prompt: str | None, seed: int, steps: int) -> Made:
        """One call of the pipe as it stands; `None` for pipelines that take no prompt, or get embeddings."""
        call = self.arguments | self.prompt_arguments(prompt)
        if self._output_type is not None:
            return self._make(call, seed, steps, self._output_type)
        refused: Exception | None = None
        for output_type in ("pt", "np"):  # a few pipelines give arrays only
            try:
                made = self._make(call, seed, steps, output_type)
            except DitAccelError:
                raise
            except (ValueError, TypeError) as error:
                refused = refused or error
            else:
                self._output_type = output_type
                return made
        raise ArgumentError(f"{type(self.pipe).__name__} refused the call: {refused}") from refused

    def _make(self, call: Mapping[str, Any], seed: int, steps: int, output_type: str) -> Made:
        last: list[Tensor] = []

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            del pipe, step, timestep
            last[:] = [tensors["latents"].detach().clone()] if "latents" in tensors else []
            return tensors

        own: dict[str, Any] = {"num_inference_steps": steps, "output_type": output_type}
        own["generator"] = torch.Generator().manual_seed(seed)
        if "callback_on_step_end" in self.parameters:
            own["callback_on_step_end"] = keep
        if self._output is not None:
            own["output"] = self._output
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # some pipelines encode their inputs without the generator
            started = time.perf_counter()
            result = self.pipe(**call, **own)
            pictures = pictures_of(result if self.is_modular else result[0])  # on the CPU, so all work is done
            seconds = time.perf_counter() - started
        return Made(pictures, last[0].float().cpu() if last else None, seconds)

    # ------------------------------------------------------------------------------------------------- what it takes

    @property
    def guidance(self) -> str | None:
        """Name of the argument that means classifier-free guidance, 1 being none; `None` if there is no such."""
        return next((name for name in _GUIDANCE if name in self.parameters), None)

    def check(self, prompts: Sequence[str | None]) -> None:
        """Raise ArgumentError if one of these prompts could not be used; nothing is run."""
        for prompt in prompts:
            self.prompt_arguments(prompt)

    def prompt_arguments(self, prompt: str | None) -> dict[str, Any]:
        """The arguments that stand for a prompt: text, or a class for pipelines that are told a class."""
        if prompt is None:
            return {}
        if "class_labels" not in self.parameters or "prompt" in self.parameters:
            self._check_known("prompt")
            return {"prompt": prompt}
        if "class_labels" in self.arguments:
            raise ArgumentError("The call argument 'class_labels' is set by `prompts`; leave one of them out.")
        return {"class_labels": [class_of(self.pipe, prompt)]}

    def _check_known(self, name: str) -> None:
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in self.parameters.values()):
            return
        if name not in self.parameters:
            allowed = [key for key in self.parameters if key != "self" and key not in OWN]
            raise ArgumentError(f"{type(self.pipe).__name__} takes no argument {name!r}; {nearest(name, allowed)}.")

    def _modular_output(self) -> str:
        names = self.pipe.blocks.output_names
        output = next((name for name in _OUTPUTS if name in names), None)
        if output is None:
            raise ArgumentError(
                f"{type(self.pipe).__name__} gives neither images nor videos ({', '.join(names)}); "
                "give a modular pipeline with its decoding."
            )
        return output


def class_of(pipe: Any, prompt: str) -> int:
    """Number of the class that is called `prompt` in `pipe.labels`, or whose number `prompt` is.

    Raises ArgumentError that names the nearest class.
    """
    labels: Mapping[str, int] = getattr(pipe, "labels", None) or {}
    wanted = prompt.strip()
    if wanted in labels:
        return labels[wanted]
    count = getattr(pipe.transformer.config, "num_embeds_ada_norm", None)  # the class after the last is "no class"
    if wanted.isdecimal() and (count is None or int(wanted) < count):
        return int(wanted)
    close = difflib.get_close_matches(wanted, labels, n=1, cutoff=0.3)
    hint = f"did you mean {close[0]!r}? " if close else ""
    numbers = "its number" if count is None else f"a number from 0 to {count - 1}"
    known = f"give one of its {len(labels)} names in pipe.labels, or {numbers}" if labels else f"give {numbers}"
    raise ArgumentError(f"{type(pipe).__name__} knows no class {shown(prompt)}; {hint}{known}.")


# ------------------------------------------------------------------------------------------------------ what it gives


def pictures_of(result: Any) -> Tensor:
    """What a pipeline returns -> images [N, C, H, W] or videos [N, F, C, H, W], float32 in [0, 1] on the CPU.

    result: tensor [N, C, H, W] or [N, F, C, H, W], array [N, H, W, C] or [N, F, H, W, C], or a list of such items.
    Raises QualityError if it is none of these, or not in [0, 1] (NaN is: the measures tell of it).
    """
    if isinstance(result, Tensor):
        pictures = result
    elif isinstance(result, (list, tuple)) and result and isinstance(result[0], Tensor):
        pictures = torch.stack(list(result))
    else:
        pictures = torch.from_numpy(np.asarray(result)).movedim(-1, -3)
    pictures = pictures.detach().cpu() / (1.0 if pictures.is_floating_point() else 255.0)
    if pictures.ndim not in (4, 5) or pictures.shape[-3] not in (1, 3, 4) or not pictures.numel():
        raise QualityError(
            f"The pipeline returned {list(pictures.shape)} instead of images [N, C, H, W] or videos [N, F, C, H, W]; "
            "give a pipeline that makes images or video."
        )
    low, high = float(pictures.min()), float(pictures.max())
    if low < -0.01 or high > 1.01:
        raise QualityError(
            f"The pipeline returned pictures with values from {low:.3g} to {high:.3g} instead of 0 to 1; "
            "give a pipeline that decodes its latents."
        )
    return pictures.float()[..., :3, :, :]  # without an alpha channel
