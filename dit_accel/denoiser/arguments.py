"""Arguments: find the latents among what a denoiser is called with, and the grid that their tokens lie on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

NAMES = ("hidden_states", "sample", "latents", "x", "vision_tokens")


def latents_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The model's input: by its usual names, or else the first floating-point tensor of three dimensions or more."""
    named = [kwargs[name] for name in NAMES if isinstance(kwargs.get(name), Tensor)]
    every = [*named, *args, *kwargs.values()]
    return next((v for v in every if isinstance(v, Tensor) and v.is_floating_point() and v.ndim >= 3), None)


def is_controlled(kwargs: Mapping[str, Any]) -> bool:
    """True where a ControlNet hands residuals to the model, by the names of the arguments."""
    return any("controlnet" in name and value is not None for name, value in kwargs.items())


def named_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module`, by name."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return dict(zip(names, args)) | dict(kwargs)


def grid_of(arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Frames, height and width in tokens, from the arguments that tell a model where each one lies; or `None`."""
    ids = arguments.get("img_ids")
    if isinstance(ids, Tensor) and ids.shape[-1] >= 2:
        flat = ids.reshape(-1, ids.shape[-1])
        if (grid := _three((flat.amax(0) - flat.amin(0) + 1).tolist())) is not None:
            return grid
    shapes = arguments.get("img_shapes")
    while isinstance(shapes, (list, tuple)) and shapes and isinstance(shapes[0], (list, tuple)):
        shapes = shapes[0]
    lengths = shapes if isinstance(shapes, (list, tuple)) else ()
    if all(isinstance(length, int) for length in lengths) and (grid := _three(lengths)) is not None:
        return grid
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    return _three([size for size in sizes if isinstance(size, int)])


def latent_grid(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The same, from the shape of the latents and the model's patch size.

    Latents are [B, C, H, W], [B, C, F, H, W] or [B, F, C, H, W]; config.in_channels tells the last two apart.
    """
    latent = latents_in((), arguments)
    if latent is None or latent.ndim not in (4, 5):
        return None
    patch = config.get("patch_size") or 1
    patches = [patch, patch] if isinstance(patch, int) else list(patch)
    frame_patch = patches[0] if len(patches) == 3 else config.get("patch_size_t") or 1
    frames = 1
    if latent.ndim == 5:
        channels_first = latent.shape[1] == config.get("in_channels") or latent.shape[2] != config.get("in_channels")
        frames = latent.shape[2] if channels_first else latent.shape[1]
    return frames // frame_patch, latent.shape[-2] // patches[-2], latent.shape[-1] // patches[-1]


def _three(lengths: Sequence[float]) -> tuple[int, int, int] | None:
    """The lengths above 1 as frames, height and width; `None` for none of them or more than three."""
    long = [int(length) for length in lengths if length > 1]
    if not 1 <= len(long) <= 3:
        return None
    frames, height, width = [1] * (3 - len(long)) + long
    return frames, height, width
