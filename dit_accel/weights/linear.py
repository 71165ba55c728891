"""VQLinear and VQEmbedding: layers whose weight is stored as codes; nn.Linear and nn.Embedding to everyone who calls.

A forward pass never holds the whole dense weight: rows are decoded tile by tile into a scratch buffer that all layers
share (dit_accel_kernels.vq_linear). `weight` is decoded when somebody asks for it, and cannot be written to.
"""

from __future__ import annotations

from typing import Any

import torch
from dit_accel_kernels import vq_linear
from torch import Tensor, nn

from dit_accel.errors import UnsupportedModelError
from dit_accel.weights.encode import look_up
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.packing import unpack
from dit_accel.weights.rotation import unpack_signs, unrotate
from dit_accel.weights.storage import Stored

SCRATCH_MB = 32.0


class SharedCodebooks(nn.Module):
    """The codebooks that layers of a model share, as buffers named by their size: "256x4" is `vq_codebooks.256x4`."""

    def __init__(self, sizes: dict[str, tuple[int, int, int]], device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        for name, shape in sizes.items():
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype or torch.bfloat16))

    def book(self, name: str) -> Tensor:
        """The codebook of a size -> [S, K, d]."""
        return self.get_buffer(name)


class DecodedWeight(Tensor):
    """The dense weight of a quantised layer, to be read: shape, dtype and device are known at once, and it is decoded
    when its numbers are asked for. Writing to it, as fusing a LoRA does, would be lost, so it is refused."""

    _layer: _Coded

    @staticmethod
    def of(layer: _Coded) -> DecodedWeight:
        """The weight [O, I] of a layer, in the dtype of its scales."""
        made = torch.empty(layer.format.shape, dtype=layer.row_scale.dtype, device="meta").as_subclass(DecodedWeight)
        made._layer = layer
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0]._layer.codes.device
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs or {})
        name = getattr(func, "__name__", "")
        if (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__isub__"):
            raise UnsupportedModelError(_NOT_WRITTEN)
        given = {key: _decoded(value) for key, value in (kwargs or {}).items()}
        return func(*(_decoded(value) for value in args), **given)

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _decoded(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        del value
        raise UnsupportedModelError(_NOT_WRITTEN)


_DEVICE = Tensor.device.__get__  # pyright: ignore[reportAttributeAccessIssue]
_KNOWN = {
    getattr(getattr(Tensor, name), "__get__", None) for name in ("shape", "dtype", "ndim", "layout", "requires_grad")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
_NOT_WRITTEN = (
    "The weight of a vector-quantised layer cannot be written to, so a LoRA cannot be fused into it; leave the LoRA "
    "unfused, or call dequantize() on the model first."
)


def _decoded(value: Any) -> Any:
    """An argument with weights in it decoded; lists as torch.stack takes them are looked into."""
    if isinstance(value, DecodedWeight):
        return value._layer.decode().to(value.dtype)
    return type(value)(_decoded(item) for item in value) if type(value) in (list, tuple) else value


class _Coded(nn.Module):
    """What both layers share: the buffers of a format, and the way back to numbers."""

    format: LayerFormat
    scratch_mb: float
    codes: Tensor
    row_scale: Tensor
    signs: Tensor | None

    def _register(self, books: SharedCodebooks | None, device: Any, dtype: torch.dtype | None) -> None:
        for name, (shape, holds_bytes) in self.format.tensors().items():
            kind = torch.uint8 if holds_bytes else dtype or torch.bfloat16
            self.register_buffer(name, torch.empty(shape, device=device, dtype=kind))
        if not self.format.block:
            self.register_buffer("signs", None)
        self._books = (books,)  # in a tuple, so that the model alone owns the shared codebooks

    @property
    def codebook_tensor(self) -> Tensor:
        """The codebook in use -> [S, K, d]."""
        if self.format.source == "own":
            return self.get_buffer("codebook")
        (books,) = self._books
        assert books is not None
        return books.book(self.format.codebook)

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """([r, I], [O, r]) in the inputs of the codes, or None."""
        return (self.get_buffer("low_rank_a"), self.get_buffer("low_rank_b")) if self.format.rank else None

    def stored(self) -> Stored:
        """The weight as storage knows it; checks every tensor."""
        return Stored(
            self.codes, self.row_scale, self.signs, self.codebook_tensor, self.low_rank, self.format.code_bits,
            self.format.shape, self.format.block,
        )  # fmt: skip

    def load(self, stored: Stored) -> None:
        """Take over what was found for this weight; a shared codebook is not written."""
        parts = {"codes": stored.codes, "row_scale": stored.row_scale, "signs": stored.signs}
        if self.format.source == "own":
            parts["codebook"] = stored.book()
        if stored.low_rank is not None:
            parts |= {"low_rank_a": stored.low_rank[0], "low_rank_b": stored.low_rank[1]}
        for name in self.format.tensors():
            value, old = parts[name], self.get_buffer(name)
            assert value is not None and value.shape == old.shape, name
            setattr(self, name, value.to(old.dtype) if old.is_meta else value.to(old.device, old.dtype))

    def decode(self) -> Tensor:
        """The dense weight -> float32 [O, I]."""
        return self.stored().decode()

    @property
    def weight(self) -> Tensor:
        """The dense weight, to be read only, decoded where its numbers are used -> [O, I], in the scales' dtype."""
        if self.codes.is_meta:
            return torch.empty(self.format.shape, device="meta", dtype=self.row_scale.dtype)
        return DecodedWeight.of(self)

    def extra_repr(self) -> str:
        kind = f"{self.format.bits_per_weight:.2f} bits a weight, {self.format.codebook} {self.format.source}"
        return f"{self.format.shape[1]}, {self.format.shape[0]}, {kind}"


class VQLinear(_Coded, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer [.., I] -> [.., O] whose weight is stored as codes.

    format: what is stored. books: the model's shared codebooks; may be None where the codebook is the layer's own.
    """

    def __init__(
        self,
        format: LayerFormat,
        books: SharedCodebooks | None = None,
        *,
        scratch_mb: float = SCRATCH_MB,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        self.format, self.scratch_mb = format, scratch_mb
        self.out_features, self.in_features = format.shape
        self._register(books, device, dtype)
        bias = nn.Parameter(torch.empty(format.shape[0], device=device, dtype=dtype)) if format.bias else None
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):  # as nn.Linear does
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return vq_linear(
            input,
            self.codes,
            self.row_scale,
            self.codebook_tensor,
            code_bits=self.format.code_bits,
            signs=self.signs,
            block=self.format.block,
            low_rank=self.low_rank,
            bias=self.bias,
            scratch_mb=self.scratch_mb,
        )


class VQEmbedding(_Coded, nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A table of rows [O, I] stored as codes: indices [..] -> [.., I]."""

    def __init__(
        self,
        format: LayerFormat,
        books: SharedCodebooks | None = None,
        *,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ):
        nn.Module.__init__(self)
        self.format = format
        self.num_embeddings, self.embedding_dim = format.shape
        self.padding_idx, self.max_norm, self.sparse = padding_idx, None, False
        self._register(books, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        rows, book = input.flatten(), self.codebook_tensor.float()
        codes = unpack(self.codes[rows], self.format.code_bits, self.format.codes_per_row)
        found = look_up(codes.unflatten(1, (self.format.stages, -1)), book) * self.row_scale[rows].float().unsqueeze(1)
        if self.low_rank is not None:
            found = found + self.low_rank[1][rows].float() @ self.low_rank[0].float()
        if self.signs is not None:
            found = unrotate(found, unpack_signs(self.signs, self.embedding_dim), self.format.block)
        return found.to(self.row_scale.dtype).view(*input.shape, self.embedding_dim)
