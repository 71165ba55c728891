"""Tiny random-weight copies of every diffusers transformer, with inputs that look like a denoising run.

`CASES` maps the class name of each transformer model of diffusers 0.42.1 to a way of building it with a few small
blocks and a way of making keyword arguments for its `forward`.  Nothing is downloaded: weights are random, and the
parameters that diffusers starts at zero (adaLN-zero gates, output projections, pad tokens, ...) are drawn anew so that
the output depends on every block.

`inputs(model, seed, progress)` keeps the conditioning fixed for a seed, blends the latent from noise (progress 0)
towards a second draw (progress 1) and lowers the timestep from its start value to 0.  A few pipelines count time
upwards instead (0 is noise); `RISING_TIME` names their time arguments.  Here their time falls like everyone else's;
a test that wants the pipeline's direction takes those entries from `inputs(model, seed, 1 - progress)`.

The configurations themselves are in `tiny_transformer_configs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils import deterministic

from dit_accel.testing.tiny_transformer_configs import ROWS, Draw, Row

__all__ = ["CASES", "NOT_BUILDABLE", "RISING_TIME", "TinyTransformer", "build", "forward"]


@dataclass(frozen=True)
class TinyTransformer:
    """One transformer class: how to build a tiny one and what to feed it."""

    name: str
    build: Callable[[int], nn.Module]
    inputs: Callable[[nn.Module, int, float], dict]


# Transformer classes for which no real tiny forward exists, with the reason.
NOT_BUILDABLE: dict[str, str] = {}

# Class name -> time arguments that rise from noise to data in the model's own pipeline.
RISING_TIME: dict[str, tuple[str, ...]] = {
    "Ideogram4Transformer2DModel": ("timestep",),
    "LongCatAudioDiTTransformer": ("timestep",),
    "Lumina2Transformer2DModel": ("timestep",),
    "LuminaNextDiT2DModel": ("timestep",),
    "MiniMaxH3Transformer3DModel": ("timestep",),
    "MiniMaxMusic3Transformer1DModel": ("timestep",),
    "MochiTransformer3DModel": ("timestep",),
    "OmniGenTransformer2DModel": ("timestep",),
    "RFD4ProteinaTransformer": ("bb_ca_time", "local_latents_time"),
    "ZImageTransformer2DModel": ("t",),
}


def _build(name: str, row: Row, blocks: int) -> nn.Module:
    return getattr(diffusers, name)(**row.config(blocks)).eval()


def _to(value: Any, device: torch.device) -> Any:
    """Move the tensors inside dictionaries, lists and tuples to a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to(item, device) for item in value)
    return value


def _inputs(row: Row, model: nn.Module, seed: int, progress: float) -> dict:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must lie in [0, 1], got {progress}")
    device = next(model.parameters()).device
    return _to(row.inputs(model, Draw(seed, progress)), device)


CASES: dict[str, TinyTransformer] = {
    name: TinyTransformer(name, partial(_build, name, row), partial(_inputs, row)) for name, row in ROWS.items()
}


def redraw(model: nn.Module, seed: int) -> None:
    """Give every parameter that carries no usable random start small seeded normal noise.

    Those are parameters that are all zero (gates, output projections, zero biases) and parameters that are not finite
    (uninitialised memory, see `build`).
    """
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(torch.isfinite(parameter).all()) or not bool(parameter.any()):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_((noise * 0.1).to(parameter.dtype))


def build(name: str, blocks: int = 6, seed: int = 0) -> nn.Module:
    """Build the tiny model of a class, with weights fixed by the seed and no parameter left at zero.

    `blocks` counts the main stack; models with a double and a single list get 2 double blocks and the rest single, and
    HunyuanDiT rounds up to an even number of at least 4.
    """
    if name not in CASES:
        raise KeyError(NOT_BUILDABLE.get(name, f"unknown transformer class {name!r}"))
    if blocks < 2:
        raise ValueError(f"a tiny transformer needs at least 2 blocks, got {blocks}")
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # In this mode `torch.empty` is filled with NaN, which makes never-initialised parameters recognisable.
            torch.use_deterministic_algorithms(True, warn_only=True)
            deterministic.fill_uninitialized_memory = True
            model = CASES[name].build(blocks)
        finally:
            torch.use_deterministic_algorithms(was_deterministic, warn_only=warn_only)
            deterministic.fill_uninitialized_memory = fill
    redraw(model, seed)
    return model


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif hasattr(output, "to_tuple"):
        yield from _tensors(output.to_tuple())


def forward(model: nn.Module, name: str, progress: float, seed: int = 0) -> torch.Tensor:
    """Run one forward without gradients and return its first output tensor, flattened."""
    with torch.no_grad():
        output = model(**CASES[name].inputs(model, seed, progress))
    return next(_tensors(output)).flatten()
