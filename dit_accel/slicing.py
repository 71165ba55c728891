"""Feature slicing and operator grouping: feed-forward layers take their tokens slice by slice, for less memory at once.

Streamlined Inference (Zhan et al., NeurIPS 2024, arXiv 2411.01171). A feed-forward layer is projection, activation,
projection, and what lies between them is the widest activation of a block. Where each token goes through the layer by
itself, a slice of the tokens can go through all of it before the next one does; the result is the same.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.denoiser.find import find_block_lists, find_denoisers
from dit_accel.denoiser.layers import layers_of
from dit_accel.denoiser.subclass import owners_of, wrap_instances
from dit_accel.diffusers_bridge import is_compiled
from dit_accel.errors import ArgumentError, UnsupportedModelError, shown

_PROBES = 12  # tokens that a layer is tried on
_ROUNDINGS = 10  # relative L2, in roundings of the dtype: matrices of fewer rows may be summed in another order


def slice_features(target: Any, slices: int = 8) -> Slicing:
    """Slice the feed-forward layers in the blocks of every denoiser, in place, until `remove()` of what is returned.

    target: a diffusers pipeline, or a denoiser module. slices: how many parts the tokens of a call are cut into, at
    least 2; a part holds at least one token. More slices take less memory and, from some number on, more time.
    Composes with `dit_accel.apply`, whichever comes first, and is taken back in any order.

    A layer runs whole while gradients are recorded, and, with a warning at its first call, where it turns out to mix
    tokens or to take anything but one tensor of tokens [B, S, C].

    Raises ArgumentError for bad slices; UnsupportedModelError where no block has such a layer, where blocks are
    compiled, and where the target is sliced already. The target is then unchanged.
    """
    if type(slices) is not int or slices < 2:
        raise ArgumentError(f"slices is {shown(slices)}; give a whole number of parts, 2 or more, such as 8.")
    denoisers = find_denoisers(target)
    for name, denoiser in denoisers.items():
        if is_compiled(denoiser):
            raise UnsupportedModelError(
                f"Blocks of {name} are compiled, so their layers cannot be sliced: the compiler has planned their "
                "memory; call slice_features() on a model that is not compiled."
            )
    kinds = _find(denoisers)
    if not kinds:
        raise UnsupportedModelError(
            f"No block of {', '.join(denoisers)} has a feed-forward layer of two linear projections or more, so there "
            "is nothing to slice (convolutions mix tokens)."
        )
    if any(isinstance(owner, Slicing) for kind in kinds for layer in kind.layers for owner in owners_of(layer)):
        raise UnsupportedModelError("The features of this target are sliced already; call remove() on that first.")
    return Slicing(kinds, slices)


@dataclass
class _Kind:
    """Layers that are built alike. layers: each with its path; width: of the widest activation inside, in channels;
    by_token: whether each token goes through by itself, `None` until the first call."""

    layers: dict[nn.Module, str]
    width: int
    by_token: bool | None = None


class Slicing:
    """Made by `slice_features`. Use as a context manager, or call `remove()`. slices: parts of a call's tokens."""

    def __init__(self, kinds: list[_Kind], slices: int):
        self.slices, self._kinds = slices, kinds
        self._undo = contextlib.ExitStack()
        for kind in kinds:
            self._undo.callback(wrap_instances([*kind.layers], self, {"forward": self._forward(kind)}))

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the sliced layers; those that turn out to mix tokens leave them at their first call."""
        return tuple(path for kind in self._kinds if kind.by_token is not False for path in kind.layers.values())

    @property
    def saves(self) -> str:
        """One sentence: what exists for a slice of the tokens only."""
        widths = [kind.width for kind in self._kinds if kind.by_token is not False]
        if not widths:
            return "Nothing is saved: no layer is sliced."
        return (
            f"{len(self.layers)} feed-forward layers hold their inner activations, up to {max(widths)} channels wide, "
            f"for 1/{self.slices} of the tokens at a time."
        )

    def remove(self) -> None:
        """Take everything back; the layers are exactly what they were. Safe to call twice."""
        self._undo.close()
        for kind in self._kinds:
            kind.by_token = False  # an offload hook that came later may still hold the sliced forward

    def __enter__(self) -> Slicing:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _forward(self, kind: _Kind) -> Callable[..., Any]:
        """`forward` and not `__call__`: a session counts, skips and remembers calls, and a slice is no call. So slices
        lie inside of what a session wraps, whichever came first."""
        plain = type(next(iter(kind.layers))).forward

        @torch.compiler.disable(reason="sliced layers run outside of compiled code; call Slicing.remove() first")
        @wraps(plain)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if _records_gradients(module, args):
                return plain(module, *args, **kwargs)
            fits = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 3
            if kind.by_token is None:
                kind.by_token = fits and _is_by_token(partial(plain, module), args[0])
                if not kind.by_token:
                    warnings.warn(
                        f"slice_features() leaves {', '.join(kind.layers.values())} whole: {type(module).__name__} "
                        "does not work on each token of one tensor [B, S, C] by itself.",
                        stacklevel=2,
                    )
            if not (fits and kind.by_token):
                return plain(module, *args, **kwargs)
            return _in_slices(partial(plain, module), args[0], self.slices)

        return forward


def _find(denoisers: dict[str, nn.Module]) -> list[_Kind]:
    """The feed-forward layers of all blocks, those built alike together."""
    kinds: dict[tuple[type, str], _Kind] = {}
    for path, layer in _mlps(denoisers):
        widths = [inner.out_features for inner in layer.modules() if isinstance(inner, nn.Linear)]
        # One projection alone has no activation between two; a forward that another library replaced is not ours.
        if len(widths) > 1 and "forward" not in vars(layer):
            kind = kinds.setdefault((type(layer), repr(layer)), _Kind({}, max(widths)))
            kind.layers[layer] = path
    return list(kinds.values())


def _mlps(denoisers: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for component, denoiser in denoisers.items():
        for path, blocks in find_block_lists(denoiser).items():
            for number, block in enumerate(blocks):
                for name, (layer, kind) in layers_of(block).items():
                    if kind == "mlp":
                        yield f"{component}.{path}.{number}.{name}", layer


def _records_gradients(module: nn.Module, arguments: tuple[Any, ...]) -> bool:
    """Backward needs every activation, so that slices would save nothing."""
    tensors = (*arguments, *module.parameters())
    return torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in tensors)


def _is_by_token(run: Callable[[Tensor], Any], tokens: Tensor) -> bool:
    """True where a few made-up tokens give the same in two parts as together.

    Made up, since real ones may be equal or zero, which would hide that they are mixed.
    """
    count = _PROBES * tokens.shape[2]
    probes = torch.arange(count, device=tokens.device).sin().view(1, _PROBES, -1).to(tokens.dtype)
    try:
        whole, parts = run(probes), _in_slices(run, probes, 2)
        allowed = _ROUNDINGS * torch.finfo(whole.dtype).eps * whole.float().norm()
        return whole.shape == parts.shape and bool((whole - parts).float().norm() <= allowed)
    except (RuntimeError, ValueError, TypeError, AttributeError):  # it asks for a grid of tokens, or gives no tensor
        return False


def _in_slices(run: Callable[[Tensor], Tensor], tokens: Tensor, slices: int) -> Tensor:
    """[B, S, C] -> [B, S, C']: slice after slice through all of the layer, written into one result."""
    size = -(-tokens.shape[1] // slices)
    first, *others = tokens.split(size, dim=1)
    part = run(first)
    result = part.new_empty(*tokens.shape[:2], *part.shape[2:])
    result[:, :size] = part
    for number, part in enumerate(others, start=1):
        result[:, number * size : (number + 1) * size] = run(part)
    return result
