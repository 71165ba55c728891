"""Compiled: the way of attention through code that torch.compile compiles, without a graph break.

A mode that Python code runs under cannot be kept in a graph. So while a layer is traced, its attention is written into
the graph as one operator of our own, with the number of the layer; when the graph runs, the operator asks what is in
force then, so nothing is compiled anew when a run begins, a step is dense or a session ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

Way = Callable[..., Tensor]  # takes what scaled_dot_product_attention takes

_ways: dict[int, Way] = {}
_numbers = itertools.count()


def register(way: Way) -> int:
    """A number for the way that the attention of one layer takes when its graph runs."""
    number = next(_numbers)
    _ways[number] = way
    return number


def forget(number: int) -> None:
    """The inverse: graphs that still hold the number are plain again."""
    del _ways[number]


# The arguments of scaled_dot_product_attention, in torch's order; what is left at its default does not arrive.
@torch.library.custom_op(
    "dit_accel::attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, float? scale=None, bool enable_gqa=False, *, int number) -> Tensor",
)
def _attention(*call: Any, number: int, **named: Any) -> Tensor:
    way = _ways.get(number, scaled_dot_product_attention)
    return way(*call, **named).contiguous()  # in the layout that the graph was promised


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any, number: int, **named: Any) -> Tensor:
    del key, rest, number, named
    return query.new_empty(*query.shape[:-1], value.shape[-1])


class Traced(TorchFunctionMode):
    """While a layer is traced, its attention becomes our operator; all else passes."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return _attention(*args, **kwargs, number=self.number)
        if func is Tensor.unflatten:  # the method goes by super(), which cannot be traced under a mode
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)
