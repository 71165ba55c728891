"""Whole: take the tensors out of what a denoiser returned, and put others of their kind in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


def tensors_in(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, in order: a tensor, a sequence, or diffusers' mapping with attributes."""
    return tuple(value for value in _values(result) if isinstance(value, Tensor))


def rebuilder(result: Any) -> Callable[[Sequence[Tensor]], Any]:
    """-> a function that gives the like of `result` with other tensors in it; holds none of its tensors."""
    kind = type(result)
    values = [None if isinstance(value, Tensor) else value for value in _values(result)]
    places = [number for number, value in enumerate(_values(result)) if isinstance(value, Tensor)]
    names = tuple(result) if isinstance(result, Mapping) else None

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        filled = list(values)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        if names is not None:
            return kind(**dict(zip(names, filled)))
        return filled[0] if issubclass(kind, Tensor) else kind(filled)

    return rebuild


def _values(result: Any) -> list[Any]:
    if isinstance(result, Mapping):
        return list(result.values())
    return list(result) if isinstance(result, (tuple, list)) else [result]
