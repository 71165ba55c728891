"""Attach: the one-off wrappers around a denoiser, its blocks and their layers; each pushes its inverse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn

from dit_accel.attention.route import attach_layers
from dit_accel.denoiser.forward import Forward, HeadSkipped
from dit_accel.denoiser.layers import layers_of
from dit_accel.denoiser.serve import ServedDenoiser, holding
from dit_accel.denoiser.subclass import alike, wrap_instance, wrap_instances
from dit_accel.diffusers_bridge import is_compiled, put_away, registered_as_blocks, split_ahead, splits_of
from dit_accel.errors import UnsupportedModelError


class AttachedDenoiser(ServedDenoiser):
    """A denoiser with wrapped calls. `attach` returns through the session's undo stack; `call` is one forward."""

    def attach(self, undo: contextlib.ExitStack) -> None:
        """Wrap the denoiser and every block; each wrap pushes its inverse."""
        component, attached = self.component, self
        base = type(component)

        @wraps(base.__call__)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is not component:
                return base.__call__(module, *args, **kwargs)
            return attached.call(lambda *a, **k: base.__call__(module, *a, **k), args, kwargs)

        undo.callback(wrap_instance(component, self.session, {"__call__": call}, equal=True))
        if hasattr(type(self.module), "cache_context"):
            context = self._context_method(type(self.module))
            undo.callback(wrap_instance(self.module, self.session, {"cache_context": context}, equal=True))
        if self.attention:  # before the cache's, which then lie around these: what is skipped costs no search
            attach_layers(self.attention, self.session, self.here, undo)
        self.check_compiled()
        for numbers in alike((type(block), path) for block, path in self.blocks):
            blocks = [self.blocks[number][0] for number in numbers]
            methods = {"__call__": self._block_call(dict(zip(blocks, numbers)))}
            base = type(blocks[0])
            undo.callback(wrap_instances(blocks, self.session, methods))
            undo.enter_context(registered_as_blocks(blocks, base))
        self._attach_layers(undo)

    def check_compiled(self) -> None:
        """Refuse what cannot act in code that was compiled by `torch.compile`."""
        cache = self.session.policy.cache
        if cache is None or not self.session.policy.skips:
            return
        inside = cache.scope.has_layers or cache.signal.of == "modulated"
        if inside and (self.compiled is not None or any(is_compiled(block) for block, _ in self.blocks)):
            raise UnsupportedModelError(
                f"Blocks of {self.name} are compiled, so nothing can be decided inside them; compile layers in place "
                "of the blocks, or give a policy whose unit is 'stack' or 'model' and whose signal is not 'modulated'."
            )

    def _attach_layers(self, undo: contextlib.ExitStack) -> None:
        """Wrap the layers inside the blocks, where the policy skips these."""
        cache = self.session.policy.cache
        if cache is None or not self.session.policy.skips or not cache.scope.has_layers:
            return
        found = [(name, *layer) for block, _ in self.blocks for name, layer in layers_of(block).items()]
        found = [(name, layer, kind) for name, layer, kind in found if cache.scope.skips_layer(kind)]
        for numbers in alike((type(layer), name) for name, layer, _ in found):
            name, _, kind = found[numbers[0]]
            layers = [found[number][1] for number in numbers]
            methods = {"__call__": self._layer_call(name, set(layers), kind)}
            undo.callback(wrap_instances(layers, self.session, methods))

    def _layer_call(self, name: str, layers: set[nn.Module], kind: str) -> Callable[..., Any]:
        """name: of the layers in their blocks."""
        plain, attached = type(next(iter(layers))).__call__, self

        @wraps(plain)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            forward = attached.here.forward
            if forward is None or module not in layers:
                return plain(module, *args, **kwargs)
            if forward.observer is not None:
                return forward.observer.layer(name, kind, lambda: plain(module, *args, **kwargs), args, kwargs)
            return forward.layer(name, kind, lambda: plain(module, *args, **kwargs))

        return call

    def _block_call(self, numbers: dict[nn.Module, int]) -> Callable[..., Any]:
        """numbers: of the blocks of one class."""
        base, attached = type(next(iter(numbers))), self
        plain = base.__call__

        @wraps(plain)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # a model that is compiled as a whole decides outside of itself
                return plain(module, *args, **kwargs)
            number, forward = numbers.get(module), attached.here.forward
            if number is None:
                return plain(module, *args, **kwargs)

            if forward is None or forward.unseen:
                return attached.run_block(number, lambda: plain(module, *args, **kwargs), args, kwargs)

            def routed(own: Any, named: Any) -> Any:
                run = lambda: attached.run_block(number, lambda: plain(module, *own, **named), own, named)  # noqa: E731
                return forward.block(number, base, attached.blocks[number][1], run, own, named)

            splits = splits_of(module)
            if not splits:
                return routed(args, kwargs)
            with split_ahead(splits, module, args, kwargs) as (own, named):
                return routed(own, named)

        return call

    def run_block(self, number: int, plain: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Run a block: compiled by itself, where the model is compiled as a whole and yet may be skipped in part."""
        here = self.here
        earlier, here.block = here.block, number
        try:
            if here.by_block is not None:
                return self.compiled_block(number, here.by_block)(*args, **kwargs)
            if here.forward is None or not here.forward.waits_for_norm:
                return plain()
            with _watched_norms(self.blocks[number][0], here.forward):
                return plain()
        except HeadSkipped:
            put_away(self.blocks[number][0])  # loaded for its norm; it was left before its hook does that
            raise
        finally:
            here.block = earlier

    def _context_method(self, base: type) -> Callable[..., Any]:
        attached, plain = self, base.cache_context  # type: ignore[attr-defined]

        @contextlib.contextmanager
        @wraps(plain)
        def cache_context(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            """Remember the branch that the pipeline names, and hand on to diffusers."""
            with holding(attached.here, "context", name), plain(module, name, *args, **kwargs) as value:
                yield value

        return cache_context

    def layer_flops(self) -> dict[nn.Module, int]:
        """FLOPs of each layer inside a block that the first observed forward found; empty unless the unit is layers."""
        return {
            getattr(self.blocks[number][0], name): count for (number, name), count in self.meter.first_layers.items()
        }


@contextlib.contextmanager
def _watched_norms(block: nn.Module, forward: Forward) -> Iterator[None]:
    """Let the first norm of the first block decide, where it is what the policy looks at."""
    norms = [child for name, child in block.named_children() if "norm" in name]
    handles = [norm.register_forward_hook(lambda m, a, result: forward.after_norm(result)) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
