"""The only module that touches private names of diffusers, accelerate, cache-dit or torch (its operators aside)."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
    names = inspect.signature(type(unwrapped(module)).forward).parameters
    return "controlnet_cond" not in names and any("time" in name or name == "t" for name in names)


def foreign_cache(target: Any, denoisers: Mapping[str, nn.Module]) -> str | None:
    """A sentence about caching by somebody else that is on already, and how to turn it off; `None` if there is none."""
    for name, module in denoisers.items():
        if getattr(module, "is_cache_enabled", False):
            return f"diffusers caching is enabled on {name}; turn it off with pipe.{name}.disable_cache()"
        if "_is_cached" in vars(module) or "_context_manager" in vars(module):
            return f"cache-dit is enabled on {name}; turn it off with cache_dit.disable_cache(pipe)"
        for hook in _hook_names(module):
            if any(word in hook.lower() for word in _CACHE_HOOK_WORDS):
                return f"the diffusers caching hook {hook!r} is on {name}; remove it before apply"
    if "_context_manager" in vars(target):
        return "cache-dit is enabled on this pipeline; turn it off with cache_dit.disable_cache(pipe)"
    return None


def _hooks_of(module: nn.Module) -> Mapping[str, Any]:
    """The hooks of diffusers on a module itself, by name; mostly none."""
    return getattr(module.__dict__.get("_diffusers_hook"), "hooks", None) or {}


def _hook_names(module: nn.Module) -> Iterator[str]:
    """Names of the hooks of diffusers on a module and all inside it. Before each run, so without the overhead of
    `modules()`, which takes four times as long."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        inner = waiting.pop()
        if inner is not None:
            yield from _hooks_of(inner)
            waiting.extend(inner._modules.values())


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


def weights_kept_away(module: nn.Module) -> str | None:
    """Why the weights of a model cannot be replaced by others as they are, and what to do; `None` where they can."""
    for child in module.modules():
        hooks = _hooks_of(child)
        group = getattr(hooks.get("group_offloading"), "group", None)
        if getattr(group, "offload_to_disk_path", None) is not None:
            return "are offloaded to disk, where only what was there at that time is kept; offload to memory instead"
        if "layerwise_casting" in hooks:
            return "are under layerwise casting, which would round codebooks and scales as well; leave that out"
    return None


def put_away(module: nn.Module) -> None:
    """Offload a module that group offload has loaded, where its call was left half-way, so that no hook does so."""
    hook = _hooks_of(module).get("group_offloading")
    if hook is not None and hook.group.offload_leader is module:
        hook.group.offload_()


def adapters_in_force(module: nn.Module) -> tuple[Any, ...]:
    """Which adapters of PEFT act in each layer, and how strongly; () without any."""
    if not getattr(module, "_hf_peft_config_loaded", False):
        return ()
    layers: list[Any] = [child for child in module.modules() if hasattr(child, "merged_adapters")]
    return tuple(
        (
            tuple(layer.active_adapters),
            bool(layer.disable_adapters),
            tuple(layer.merged_adapters),
            tuple((name, float(scale)) for name, scale in layer.scaling.items()),
        )
        for layer in layers
    )


@contextlib.contextmanager
def registered_as_blocks(blocks: Sequence[nn.Module], base: type) -> Iterator[None]:
    """Let diffusers know these blocks for what their class was: guiders that skip layers look up the exact class."""
    from diffusers.hooks._helpers import TransformerBlockRegistry as registry

    try:
        about = registry.get(base)
    except ValueError:  # of a class that diffusers does not know either
        yield
        return
    wrapped = type(blocks[0])
    registry.register(wrapped, replace(about))
    try:
        yield
    finally:
        del registry._registry[wrapped]


def context_group(module: nn.Module) -> Any:
    """The process group whose ranks share the tokens of one sequence (diffusers' context parallelism), or None."""
    config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    return mesh.get_group() if mesh is not None and mesh.size() > 1 else None


def splits_of(module: nn.Module) -> list[Any]:
    """The hooks inside `__call__` by which context parallelism splits a module's arguments over ranks; mostly none."""
    return [hook.fn_ref for name, hook in _hooks_of(module).items() if name.startswith("cp_input")]


@contextlib.contextmanager
def split_ahead(
    splits: Sequence[Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of a call as context parallelism splits them for this rank; meanwhile its hooks let them be.

    splits: of `splits_of`. Wan's first block has one: who watches calls from outside would see the whole sequence go in
    and a part come out.
    """
    kept = [split.pre_forward for split in splits]
    try:
        for split in reversed(splits):  # the hook registered last runs first
            args, kwargs = split.pre_forward(module, *args, **kwargs)
            split.pre_forward = lambda _, *a, **k: (a, k)
        yield args, kwargs
    finally:
        for split, own in zip(splits, kept):
            split.pre_forward = own


def unwrapped(component: nn.Module) -> nn.Module:
    """The model inside what `torch.compile(model)` gives; a model itself as it is."""
    inner = component._modules.get("_orig_mod")
    return component if inner is None else inner


def is_compiled(module: nn.Module) -> bool:
    """True where this module or one inside it was compiled, in place or by `torch.compile(module)`."""
    return any(
        vars(child).get("_compiled_call_impl") is not None or "_orig_mod" in child._modules
        for child in module.modules()
    )


@dataclass(frozen=True)
class Compiled:
    """A model that is compiled as a whole. uncompiled: its call without that; context: compiles other functions in the
    same way."""

    uncompiled: Callable[..., Any]
    context: Callable[[Callable[..., Any]], Callable[..., Any]]

    def like(self, module: nn.Module) -> Callable[..., Any]:
        """The call of another module, compiled in the same way."""
        return self.context(module._call_impl)


def compiled_whole(component: nn.Module) -> Compiled | None:
    """How a model is compiled as a whole: by `model.compile()`, or by `torch.compile(model)` around it."""
    model = unwrapped(component)
    made = vars(model).get("_compiled_call_impl")
    if made is not None and hasattr(made, "_torchdynamo_orig_callable"):  # holds what it was compiled with, if any does
        return Compiled(model._call_impl, inspect.getclosurevars(made).nonlocals.get("self", torch.compile))
    context = vars(component).get("dynamo_ctx")
    return None if context is None else Compiled(model._call_impl, context)


def graph_counts() -> tuple[int, int]:
    """Graphs that torch.compile has made in this process since it was reset, and its graph breaks."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


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


def forget_config(model: nn.Module, *keys: str) -> None:
    """Take keys out of a diffusers model's config; it has a public way to add them, and none back."""
    from diffusers.configuration_utils import FrozenDict

    if hasattr(model, "_internal_dict"):
        left = {key: value for key, value in model._internal_dict.items() if key not in keys}  # pyright: ignore
        model._internal_dict = FrozenDict(left)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def model_being_loaded() -> dict[str, Any] | None:
    """folder, variant and safetensors (False where a pickle was asked for) of the local model that a `from_pretrained`
    further up the stack is about to read; None where there is none.

    diffusers tells a quantizer what the config says, and where the weights lie only after it has opened them, which for
    a pickle is too late. So this looks at its local variables; where they are called otherwise, checks come later.
    """
    frame = inspect.currentframe()
    while frame is not None:
        given = frame.f_locals if frame.f_code.co_name == "from_pretrained" else {}
        if "hf_quantizer" in given and "pretrained_model_name_or_path" in given:
            folder = Path(given["pretrained_model_name_or_path"], given.get("subfolder") or "")
            safe = given.get("use_safetensors") is not False and not given.get("use_flashpack")
            found = {"folder": folder, "variant": given.get("variant"), "safetensors": safe}
            return found if folder.is_dir() else None
        frame = frame.f_back
    return None


def class_named(name: str) -> type[Any] | None:
    """The model class of diffusers of this name, or None."""
    import diffusers

    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, diffusers.ModelMixin) else None


class _StateDict(OrderedDict[str, Tensor]):
    """A state dict that also answers for weights it does not hold, with empty tensors of their shapes: the LoRA loader
    of Flux pipelines looks up `<layer>.weight` in it. Walking over it, saving and copying know nothing of them."""

    weights: Mapping[str, Tensor]

    def __missing__(self, key: str) -> Tensor:
        return self.weights[key]

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())


def _answer_for_weights(model: nn.Module, state: OrderedDict[str, Tensor], prefix: str, metadata: Any) -> Any:
    """A hook of `state_dict()` on the whole model."""
    del metadata
    if prefix:
        return None
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "weight" not in m._parameters
    }
    made = _StateDict(state)
    made._metadata = getattr(state, "_metadata", None)  # pyright: ignore[reportAttributeAccessIssue]
    made.weights = {
        f"{name.removesuffix('.base_layer')}.weight": torch.empty(layer.out_features, layer.in_features, device="meta")
        for name, layer in layers.items()
    }
    return made


def answer_for_weights(model: nn.Module, answer: bool = True) -> None:
    """Let `model.state_dict()["<layer>.weight"]` tell the shape of layers that hold no weight; False takes it back."""
    hooks = model._state_dict_hooks
    for key in [key for key, hook in hooks.items() if hook is _answer_for_weights]:
        del hooks[key]
    if answer:
        model._register_state_dict_hook(_answer_for_weights)


def class_name_of(config: Mapping[str, Any]) -> Any:
    """What a config of diffusers says its class is called."""
    return config.get("_class_name")
