"""Route: the way into a model's softmax attention, without a registry or private names.

Each attention layer inside the blocks gets a one-off `__call__` (denoiser/subclass.py) that runs it under a torch
function mode; the mode sees every `scaled_dot_product_attention` of that layer, whoever calls it, and hands it to the
`Route` of the denoiser call in progress. In a layer that torch.compile compiles it is an operator of compiled.py. Which
key blocks are kept, and the arithmetic, is attend.py's.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple, Protocol

import dit_accel_kernels as kernels
import torch
from dit_accel_kernels import KernelError, choose_implementation
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dit_accel.attention.attend import attend
from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.compiled import Traced, forget, register
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.search import Memory, must_search
from dit_accel.denoiser.clock import StepInfo
from dit_accel.denoiser.flops import FlopMeter, attention_flops, counting
from dit_accel.denoiser.layers import is_attention
from dit_accel.denoiser.subclass import alike, wrap_instances
from dit_accel.errors import KernelUnavailableError, NonFiniteError
from dit_accel.stats import LayerAttention


class AttentionCall(NamedTuple):
    """Arguments of `scaled_dot_product_attention`, in torch's order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def factor(self) -> float:
        """What the scores are multiplied by."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def plain(self) -> Tensor:
        """Dense attention."""
        return scaled_dot_product_attention(*self[:6], scale=self.scale, enable_gqa=self.enable_gqa)

    def biased(self, bias: Tensor) -> Tensor:
        """Dense attention with a bias added to the scores, broadcast to [B, H, S, S]."""
        return scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            attn_mask=added(self.attn_mask, bias).to(self.query.dtype),
            dropout_p=self.dropout_p,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )


@dataclass(frozen=True)
class AttentionEvent:
    """One attention call, for listeners.

    query, key: [B, H, S, D] in the order of the sequence; key_bias: [B or 1, H or 1, S] or `None`; grid: of the tokens,
    `None` where unknown; memory: the blocks that were kept, `None` where the call was dense, and reason says why.
    """

    layer: str
    step: int
    branch: str
    query: Tensor
    key: Tensor
    scale: float
    key_bias: Tensor | None
    grid: TokenGrid | None
    memory: Memory | None
    reason: str | None


@dataclass(frozen=True)
class Layer:
    """An attention layer of a denoiser. name: its path; depth: place among all of them, from 0 to 1; block: number of
    the block that it is in; place: its path in that."""

    name: str
    module: nn.Module
    depth: float
    block: int
    place: str


@dataclass
class Route:
    """The attention of one denoiser call.

    layers: counts of the whole session, by layer; memories: what the run knows of each call, handed from step to step;
    rows: tell these calls from others of the same layer; grid: of so many tokens, `None` where unknown; text_bias:
    added to the scores of text keys; dense, made: FLOPs of the attention calls seen, dense and as they were made, with
    the search.
    """

    settings: BlockSparse
    meter: FlopMeter
    info: StepInfo
    denoiser: str
    rows: tuple[int, ...]
    grid: Callable[[int], TokenGrid | None]
    memories: dict[Any, Memory]
    layers: dict[str, LayerAttention]
    listeners: Sequence[Callable[[AttentionEvent], None]] = ()
    text_bias: float = 0.0
    dense: int = 0
    made: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    def attention(self, layer: Layer, plain: Callable[[], Tensor], call: AttentionCall) -> Tensor:
        """One attention call: sparse, or dense with the reason counted."""
        counts = self.layers.setdefault(layer.name, LayerAttention())
        number = self.calls[layer.name]
        self.calls[layer.name] += 1
        flops = attention_flops(call.query, call.key, call.value) if call.query.ndim == 4 else 0
        self.dense += flops
        grid, bias = None, None
        reason = self._why_dense(layer, call)
        if reason is None:
            bias, reason = key_bias(call)
        if (reason is None or self.listeners or self.text_bias) and call.query.shape == call.key.shape:
            grid = self.grid(call.query.shape[2])
            reason = reason or ("unknown token grid" if grid is None else None)
        text = text_bias(self.text_bias, grid, call.query)
        memory = None
        if reason is not None or grid is None:
            made = flops
            output = plain() if text is None or call.is_causal else call.biased(text[:, :, None])
            counts.add_dense(reason or "")
        else:
            bias = bias if text is None else added(bias, text)
            with self.meter.counted_as(flops):
                output, memory, made = self._sparse((layer.name, number), grid, bias, call)
            counts.add_sparse(made / flops)
        self.made += made
        for listener in self.listeners:
            listener(
                AttentionEvent(
                    layer.name,
                    self.info.step,
                    self.info.branch,
                    call.query,
                    call.key,
                    call.factor,
                    bias,
                    grid,
                    memory,
                    reason,
                )
            )
        return output

    def _why_dense(self, layer: Layer, call: AttentionCall) -> str | None:
        """Why this call stays dense; `None` where it may be sparse."""
        settings, query = self.settings, call.query
        total = None if self.info.remaining is None else self.info.step + self.info.remaining
        first_steps = math.ceil(settings.dense_steps * total) if total else math.ceil(settings.dense_steps)
        checks = {
            "not of four dimensions": query.ndim != 4 or call.key.ndim != 4,
            "cross-attention": query.ndim == 4 and query.shape[2:] != call.key.shape[2:],
            "values of another width": query.shape[-1] != call.value.shape[-1],
            "short sequence": query.shape[-2] < settings.min_tokens,
            "causal": call.is_causal,
            "dropout": call.dropout_p > 0,
            "grouped queries": call.enable_gqa and query.shape[1] != call.key.shape[1],
            "gradients": torch.is_grad_enabled() and any(t.requires_grad for t in call[:3]),
            "first steps": self.info.step < first_steps,
            "first layers": layer.depth < settings.dense_layers,
            "exact": settings.is_exact,
        }
        reason = next((reason for reason, holds in checks.items() if holds), None)
        return reason or self._why_no_kernel(query)

    def _why_no_kernel(self, query: Tensor) -> str | None:
        """Why dense attention is faster here than the part that the policy asks for."""
        try:
            chosen = choose_implementation(query, self.settings.density, self.settings.impl)
        except kernels.KernelUnavailableError as error:
            raise KernelUnavailableError(f"BlockSparse.{error}") from None
        return "no kernel that beats it" if chosen == "dense" and self.settings.impl == "auto" else None

    def _sparse(
        self, place: tuple[str, int], grid: TokenGrid, bias: Tensor | None, call: AttentionCall
    ) -> tuple[Tensor, Memory | None, int]:
        """The output, the blocks that were kept, and the FLOPs that it took."""
        settings, query = self.settings, call.query
        layout = layout_of(grid, settings.order, settings.tile, settings.block_size)
        key = (self.denoiser, self.info.branch, self.rows, *place, query.shape, query.dtype)
        memory = self.memories.get(key)
        fits = memory is not None and memory.fits(settings, layout, query)
        searching = must_search(settings, memory if fits else None, self.info.step)
        searches, kind = self.meter.searches, (layout, query.shape, query.dtype, fits)
        own_kernel = choose_implementation(query, 0.5, settings.impl) in ("cpu", "triton")  # no operator of torch
        known = own_kernel and (kind in searches or not searching)  # counting costs more than a small search
        with contextlib.nullcontext() if known else counting() as counter:
            try:
                result = attend(
                    settings,
                    layout,
                    query,
                    call.key,
                    call.value,
                    scale=call.factor,
                    key_bias=bias,
                    memory=memory,
                    step=self.info.step,
                    layer=place[0],
                )
            except KernelError as error:
                where = f"{place[0]} at step {self.info.step} ({self.info.branch})"
                if "NaN" in str(error):
                    raise NonFiniteError(f"The attention of {where}: {error}") from None
                raise
        if result.memory is not None:
            self.memories[key] = result.memory
        if not own_kernel:
            return result.output, result.memory, counter.total if counter else 0
        dense = attention_flops(query, call.key, call.value)
        rest = dense // settings.block_size if settings.rest == "mean" and result.density < 1 else 0
        if counter:
            searches[kind] = counter.total - rest
        kept = round(result.density * dense) + rest
        return result.output, result.memory, kept + (searches[kind] if searching else 0)


def key_bias(call: AttentionCall) -> tuple[Tensor | None, str | None]:
    """(bias of each key [B, H, S], bool or `None`), or (`None`, why this mask is none of keys)."""
    mask = call.attn_mask
    if mask is None:
        return None, None
    if mask.ndim == 4 and mask.shape[2] == 1:
        return mask[:, :, 0], None
    if mask.ndim == 2 and mask.shape == (1, call.key.shape[2]):
        return mask[None], None
    return None, "full mask"


def text_bias(bias: float, grid: TokenGrid | None, query: Tensor) -> Tensor | None:
    """What a stage of lower resolution adds to the scores of text keys [1, 1, S]; `None` where that is nothing."""
    if not bias or grid is None or not grid.text_length:
        return None
    keys = query.new_zeros(1, 1, grid.tokens, dtype=torch.float32)
    start = 0 if grid.text_first else grid.image_tokens
    keys[..., start : start + grid.text_length] = bias
    return keys


def added(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A mask of scores, `None`, bool or additive, and a bias, in one."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return mask + bias


class _Seen(TorchFunctionMode):
    """Hands `scaled_dot_product_attention` to a route; everything else passes."""

    def __init__(self, route: Route, layer: Layer):
        super().__init__()
        self.route, self.layer = route, layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self.route.attention(self.layer, lambda: func(*args, **kwargs), AttentionCall(*args, **kwargs))


def attention_layers(blocks: Mapping[str, nn.Module]) -> list[Layer]:
    """The outermost attention layers inside blocks, in their order; where no block has one, blocks are the layers.

    blocks: path -> block.
    """
    found: list[tuple[str, nn.Module, int, str]] = []

    def walk(path: str, module: nn.Module, block: int, place: str) -> None:
        if is_attention(module):
            found.append((path, module, block, place))
            return
        for name, child in module.named_children():
            walk(f"{path}.{name}", child, block, f"{place}.{name}")

    for number, (path, block) in enumerate(blocks.items()):
        walk(path, block, number, "")
    found = found or [(path, block, number, "") for number, (path, block) in enumerate(blocks.items())]
    return [Layer(name, module, n / len(found), block, place) for n, (name, module, block, place) in enumerate(found)]


class Here(Protocol):
    """What the calling thread is in: the way of its attention, the number of the block that is running, and whether the
    whole model is one compiled graph, in which no block is seen to run."""

    route: Route | None
    block: int | None
    in_one_graph: bool


def attach_layers(layers: Sequence[Layer], owner: Any, here: Here, undo: contextlib.ExitStack) -> None:
    """Let the calls of these layers pass through the route in force; pushes the inverses on `undo`."""
    for numbers in alike((type(layer.module), layer.place) for layer in layers):
        _attach_alike([layers[number] for number in numbers], owner, here, undo)


def _attach_alike(layers: Sequence[Layer], owner: Any, here: Here, undo: contextlib.ExitStack) -> None:
    """The same for layers of one class that stand at the same place in their blocks. One graph serves all such blocks,
    so that only the block that is running tells, when the graph runs, which of the layers it is."""
    plain, by_block = type(layers[0].module).__call__, {layer.block: layer for layer in layers}
    by_module = {id(layer.module): layer for layer in layers}

    def way_of(find: Callable[[], Layer | None]) -> Callable[..., Tensor]:
        def way(*call: Any, **named: Any) -> Tensor:
            route, layer, given = here.route, find(), AttentionCall(*call, **named)
            return given.plain() if route is None or layer is None else route.attention(layer, given.plain, given)

        return way

    shared = register(way_of(lambda: None if here.block is None else by_block.get(here.block)))
    own = {key: register(way_of(lambda layer=layer: layer)) for key, layer in by_module.items()}
    for number in (shared, *own.values()):
        undo.callback(forget, number)

    @wraps(plain)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            with Traced(own[id(module)] if here.in_one_graph else shared):
                return plain(module, *args, **kwargs)
        route, layer = here.route, by_module.get(id(module))
        if route is None or layer is None:
            return plain(module, *args, **kwargs)
        with _Seen(route, layer):
            return plain(module, *args, **kwargs)

    undo.callback(wrap_instances([layer.module for layer in layers], owner, {"__call__": call}))
