"""Wanted: one checked request: which picture, made how; the same whether it comes from the page or through the API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.errors import ArgumentError
from dit_accel.policy import Policy
from dit_accel.studio.accepted import accepted
from dit_accel.studio.catalogue import Model
from dit_accel.studio.limits import Limits, number, text, whole

FULL_RUN = 50  # steps of the run that the cap on work is measured by


@dataclass(frozen=True)
class Wanted:
    """pipeline: its name; arguments: of the call besides prompt, seed and steps; policy_name: `None` for one's own."""

    pipeline: str
    prompt: str
    seed: int
    steps: int
    arguments: Mapping[str, Any]
    policy: Policy
    policy_name: str | None

    @property
    def row(self) -> dict[str, Any]:
        """The request as an item of a manifest of `dit-accel render`, without its policy."""
        return {"prompt": self.prompt, "seed": self.seed, "num_inference_steps": self.steps} | dict(self.arguments)


def wanted(
    model: Model,
    limits: Limits,
    *,
    prompt: Any,
    seed: Any,
    steps: Any,
    guidance: Any = None,
    height: Any = None,
    width: Any = None,
    frames: Any = None,
    policy: Any = "balanced",
) -> Wanted:
    """A request, checked. What is `None` is the pipeline's own.

    Raises ArgumentError, PolicyError.
    """
    chosen, name = accepted(policy, limits)
    count = whole("steps", steps, 1, limits.steps)
    fewest = chosen.cache.fewest_steps if chosen.cache is not None and chosen.skips else 1
    if count < fewest:
        raise ArgumentError(f"steps is {count}, too few for this policy to skip any; give at least {fewest}.")
    arguments = dict(model.defaults)
    arguments.pop("class_labels", None)  # the prompt says which
    if guidance is not None:
        if model.guidance is None:
            raise ArgumentError(f"{model.name} takes no guidance scale; leave guidance out.")
        arguments[model.guidance] = number("guidance", guidance, 0.0, limits.guidance)
    arguments |= _sizes(model, limits, count, height, width, frames)
    return Wanted(
        model.name,
        text("prompt", prompt, limits.letters),
        whole("seed", seed, 0, limits.seed),
        count,
        arguments,
        chosen,
        name,
    )


def _sizes(model: Model, limits: Limits, steps: int, height: Any, width: Any, frames: Any) -> dict[str, int]:
    sizes: dict[str, int] = {}
    if model.size is None and (height is not None or width is not None):
        raise ArgumentError(f"{model.name} makes pictures of one size; leave height and width out.")
    if model.frames is None and frames is not None:
        raise ArgumentError(f"{model.name} makes images, not videos; leave frames out.")
    for name, given, own in zip(("height", "width"), (height, width), model.size or ()):
        value = own if given is None else given
        sizes[name] = whole(name, value, model.multiple, limits.times_side * own, model.multiple)
    if model.frames is not None:
        value = model.frames if frames is None else frames
        sizes["num_frames"] = whole("frames", value, 1, limits.times_frames * model.frames)
    own_work, work = FULL_RUN, steps
    for value, own in zip(sizes.values(), (*(model.size or ()), model.frames or 1)):
        own_work, work = own_work * own, work * value
    if work > limits.times_work * own_work:
        raise ArgumentError(
            f"height * width * frames * steps is {work}, more than this server makes at once; give at most "
            f"{limits.times_work * own_work}, {limits.times_work} times {FULL_RUN} steps at the pipeline's own size."
        )
    return sizes
