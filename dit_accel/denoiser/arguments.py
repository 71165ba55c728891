"""Arguments: find the latents among what a denoiser is called with, and the grid that their tokens lie on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

NAMES = ("hidden_states", "sample", "latents", "x", "vision_tokens")


def latents_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The model's input: by its usual names, or else the first floating-point tensor of three dimensions or more."""
    named = [kwargs[name] for name in NAMES if isinstance(kwargs.get(name), Tensor)]
    every = [*named, *args, *kwargs.values()]
    return next((v for v in every if isinstance(v, Tensor) and v.is_floating_point() and v.ndim >= 3), None)


def grid_of(kwargs: Mapping[str, Any], tokens: int) -> tuple[int, ...] | None:
    """(T,) H, W of a list of latent tokens, from the arguments that tell a model where each one lies; or `None`."""
    candidates: list[tuple[int, ...]] = []
    ids = kwargs.get("img_ids")
    if isinstance(ids, Tensor) and ids.shape[-1] >= 2 and ids.shape[-2] == tokens:
        flat = ids.reshape(-1, ids.shape[-1])[-tokens:]
        span = (flat.amax(0) - flat.amin(0) + 1).tolist()
        candidates.append(tuple(int(length) for length in span if length > 1))
    shapes = kwargs.get("img_shapes")
    while isinstance(shapes, (list, tuple)) and shapes and isinstance(shapes[0], (list, tuple)):
        shapes = shapes[0]
    if isinstance(shapes, (list, tuple)) and all(isinstance(length, int) for length in shapes):
        candidates.append(tuple(length for length in shapes if length > 1))
    sizes = [kwargs.get(name) for name in ("num_frames", "height", "width")]
    known = tuple(size for size in sizes if isinstance(size, int) and size > 1)
    candidates.append(known)
    for grid in candidates:
        count = 1
        for length in grid:
            count *= length
        if grid and count == tokens:
            return grid
    return None
