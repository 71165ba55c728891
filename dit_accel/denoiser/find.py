"""Find: which components are denoisers, and which module lists in them may hold blocks. No registry, no class names."""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.diffusers_bridge import components_of, is_pipeline, takes_timestep, unwrapped
from dit_accel.errors import UnsupportedModelError


def find_denoisers(target: Any) -> dict[str, nn.Module]:
    """Component name -> denoiser: every module of the pipe that takes a time step and holds lists of modules.

    A bare module is its own denoiser, named "transformer".
    """
    if is_pipeline(target):
        components = components_of(target)
        found: dict[str, nn.Module] = {}
        for name, module in components.items():
            fits = isinstance(module, nn.Module) and takes_timestep(module) and find_block_lists(module)
            if fits and all(module is not other for other in found.values()):  # one model may stand in two places
                found[name] = module
        if not found:
            names = ", ".join(sorted(n for n, m in components.items() if isinstance(m, nn.Module))) or "none"
            raise UnsupportedModelError(
                f"{type(target).__name__} has no denoiser made of transformer blocks (its modules: {names}); "
                "give a pipeline with a diffusion transformer, or the transformer itself."
            )
        return found
    if isinstance(target, nn.Module):
        if not find_block_lists(target):
            raise UnsupportedModelError(
                f"{type(target).__name__} holds no list of blocks (an nn.ModuleList of at least two modules), so there "
                "is nothing to skip; give the diffusion transformer."
            )
        return {"transformer": target}
    raise UnsupportedModelError(
        f"apply() got {type(target).__name__}; give a diffusers pipeline, a modular pipeline or a transformer module."
    )


def find_block_lists(module: nn.Module) -> dict[str, nn.ModuleList]:
    """Path -> list, for every module list of at least two modules that lies in no other such list."""
    found: dict[str, nn.ModuleList] = {}
    module = unwrapped(module)

    def walk(parent: nn.Module, path: str) -> None:
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) >= 2:
                found[path + name] = child
            else:
                walk(child, f"{path}{name}.")

    walk(module, "")
    return found
