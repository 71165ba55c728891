"""Whole: take the tensors out of what a denoiser returned, and put others of their kind in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors of a result, in order, however deep: in sequences, and in diffusers' mappings with attributes."""
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors_in(value)]


def rebuilder(result: Any) -> Callable[[Sequence[Tensor]], Any]:
    """-> a function that gives the like of `result` with other tensors in it; it keeps none of those of `result`."""
    build = _builder(result)
    return lambda tensors: build(iter(tensors))


def _builder(value: Any) -> Callable[[Iterator[Tensor]], Any]:
    if isinstance(value, Tensor):
        return next
    if isinstance(value, Mapping):
        kind, parts = type(value), {name: _builder(part) for name, part in value.items()}
        return lambda tensors: kind(**{name: build(tensors) for name, build in parts.items()})
    if isinstance(value, (tuple, list)):
        kind, builders = type(value), [_builder(part) for part in value]
        return lambda tensors: kind([build(tensors) for build in builders])
    return lambda tensors: value
