"""Attach: the one-off wrappers around a denoiser, its blocks and their layers; each pushes its inverse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from torch import nn

from dit_accel.attention.route import attach_layer
from dit_accel.denoiser.forward import Forward
from dit_accel.denoiser.layers import layers_of
from dit_accel.denoiser.serve import ServedDenoiser, holding
from dit_accel.denoiser.subclass import wrap_instance
from dit_accel.diffusers_bridge import is_compiled
from dit_accel.errors import UnsupportedModelError


class AttachedDenoiser(ServedDenoiser):
    """A denoiser with wrapped calls. `attach` returns through the session's undo stack; `call` is one forward."""

    def attach(self, undo: contextlib.ExitStack) -> None:
        """Wrap the denoiser and every block; each wrap pushes its inverse."""
        base = type(self.module)
        attached = self

        @wraps(base.__call__)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is not attached.module:
                return base.__call__(module, *args, **kwargs)
            return attached.call(lambda *a, **k: base.__call__(module, *a, **k), args, kwargs)

        methods: dict[str, Callable[..., Any]] = {"__call__": call}
        if hasattr(base, "cache_context"):
            methods["cache_context"] = self._context_method(base)
        undo.callback(wrap_instance(self.module, self.session, methods))
        for layer in self.attention:  # before the cache's, which then lie around these: what is skipped costs no search
            attach_layer(layer, self.session, lambda: self.here.route, undo)
        for number, (block, path) in enumerate(self.blocks):
            undo.callback(wrap_instance(block, self.session, {"__call__": self._block_call(number, block, path)}))
            self._attach_layers(block, undo)

    def _attach_layers(self, block: nn.Module, undo: contextlib.ExitStack) -> None:
        """Wrap the layers inside a block, where the policy skips these."""
        cache = self.session.policy.cache
        if cache is None or not self.session.policy.skips:
            return
        inside = cache.scope.has_layers or cache.signal.of == "modulated"
        if inside and is_compiled(block):
            raise UnsupportedModelError(
                f"Blocks of {self.name} are compiled, so nothing can be decided inside them; compile layers in place "
                "of the blocks, or give a policy whose unit is 'stack' or 'model' and whose signal is not 'modulated'."
            )
        if not cache.scope.has_layers:
            return
        for name, (layer, kind) in layers_of(block).items():
            if cache.scope.skips_layer(kind):
                undo.callback(wrap_instance(layer, self.session, {"__call__": self._layer_call(name, layer, kind)}))

    def _layer_call(self, name: str, layer: nn.Module, kind: str) -> Callable[..., Any]:
        plain, attached = type(layer).__call__, self

        @wraps(plain)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            forward = attached.here.forward
            if forward is None or module is not layer:
                return plain(module, *args, **kwargs)
            if forward.observer is not None:
                return forward.observer.layer(name, kind, lambda: plain(module, *args, **kwargs), args, kwargs)
            return forward.layer(name, kind, lambda: plain(module, *args, **kwargs))

        return call

    def _block_call(self, number: int, block: nn.Module, path: str) -> Callable[..., Any]:
        base, attached = type(block), self
        plain = base.__call__

        @wraps(plain)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            forward = attached.here.forward
            if forward is None or module is not block:
                return plain(module, *args, **kwargs)

            def run() -> Any:
                with _watched_norms(module, forward):
                    return plain(module, *args, **kwargs)

            return forward.block(number, base, path, run, args, kwargs)

        return call

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
    if not forward.waits_for_norm:
        yield
        return
    norms = [child for name, child in block.named_children() if "norm" in name]
    handles = [norm.register_forward_hook(lambda m, a, result: forward.after_norm(result)) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
