"""The only module that touches private names of diffusers, accelerate, cache-dit or torch (its operators aside)."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_CACHE_HOOK_WORDS = ("cache", "broadcast", "taylor")


def components_of(pipe: Any) -> dict[str, Any]:
    """Named components of a `DiffusionPipeline` or `ModularPipeline`."""
    components = getattr(pipe, "components", None)
    return dict(components) if isinstance(components, Mapping) else {}


def is_pipeline(target: Any) -> bool:
    """True for diffusers pipelines, classic and modular."""
    from diffusers import DiffusionPipeline, ModularPipeline

    return isinstance(target, (DiffusionPipeline, ModularPipeline))


def takes_timestep(module: nn.Module) -> bool:
    """True where `forward` is conditioned on a time: what tells a denoiser from an encoder, without class names."""
    names = inspect.signature(type(module).forward).parameters
    return "controlnet_cond" not in names and any("time" in name or name == "t" for name in names)


def foreign_cache(target: Any, denoisers: Mapping[str, nn.Module]) -> str | None:
    """A sentence about caching by somebody else that is on already, and how to turn it off; `None` if there is none."""
    for name, module in denoisers.items():
        if getattr(module, "is_cache_enabled", False):
            return f"diffusers caching is enabled on {name}; turn it off with pipe.{name}.disable_cache()"
        if "_is_cached" in vars(module) or "_context_manager" in vars(module):
            return f"cache-dit is enabled on {name}; turn it off with cache_dit.disable_cache(pipe)"
        for child in module.modules():
            registry = vars(child).get("_diffusers_hook")
            hooks = getattr(registry, "hooks", None) or {}
            word = next((hook for hook in hooks if any(w in hook.lower() for w in _CACHE_HOOK_WORDS)), None)
            if word is not None:
                return f"the diffusers caching hook {word!r} is on {name}; remove it before apply"
    if "_context_manager" in vars(target):
        return "cache-dit is enabled on this pipeline; turn it off with cache_dit.disable_cache(pipe)"
    return None


def foreign_attention(module: nn.Module) -> str | None:
    """A sentence about attention that does not go through torch's `scaled_dot_product_attention`, and how to turn it
    back; `None` where it does, as far as can be seen before it runs."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    if getattr(module, "_parallel_config", None) is not None:
        return "context parallelism is on, which shows each process a part of the tokens only; turn it off"
    processors = [p for child in module.modules() if (p := getattr(child, "processor", None)) is not None]
    own = {getattr(processor, "_attention_backend", None) for processor in processors} - {None}
    everywhere = _AttentionBackendRegistry.get_active_backend()[0]
    if own:
        foreign = sorted(name for one in own if "native" not in (name := str(getattr(one, "value", one))))
        return f"the attention backend {foreign[0]!r} is set; call reset_attention_backend() on it" if foreign else None
    name = str(getattr(everywhere, "value", everywhere))
    uses = any(hasattr(processor, "_attention_backend") for processor in processors)
    if uses and "native" not in name:
        return f"the attention backend {name!r} is in force; call set_attention_backend('native') on the transformer"
    return None


def is_compiled(module: nn.Module) -> bool:
    """True where this module or one inside it was compiled in place by `module.compile()`."""
    return any(vars(child).get("_compiled_call_impl") is not None for child in module.modules())


def hides_from_counters(module: nn.Module) -> bool:
    """True where a dispatch mode would not see the operators, or break them: blocks compiled in place, and flex
    attention, which compiles itself and refuses to under a foreign mode (torch 2.13). Flex is told by the source of the
    files that the modules and their attention processors come from, or by the backend that was set."""
    processors = [p for child in module.modules() if (p := getattr(child, "processor", None)) is not None]
    files = {type(item).__module__ for item in (*module.modules(), *processors)}
    backends = {str(getattr(getattr(p, "_attention_backend", None), "value", "")) for p in processors}
    return "flex" in backends or any(_names_flex(file) for file in files) or is_compiled(module)


@functools.cache
def _names_flex(module_name: str) -> bool:
    try:
        return "flex_attention" in inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):  # no source: built-in, or made at run time
        return False


def tensor_version(tensor: Tensor) -> int | str:
    """Something that changes with every in-place write: torch's counter, or under inference mode, which keeps none, the
    norm of the content (as text, since NaN equals nothing)."""
    if not tensor.is_inference():
        return tensor._version
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return ""
    return str(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)).item())
