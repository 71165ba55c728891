"""The format of one vector-quantised layer: what is stored of it, told apart from the tensors, so that files can be
checked before anything is allocated, and models counted before anything is quantised."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dit_accel.errors import CheckpointError, shown
from dit_accel.weights.packing import BITS, packed_length

KINDS = ("linear", "embedding")
SOURCES = ("shared", "own")  # one codebook for all layers of its size, or one of the layer's own
_SIZE = re.compile(r"[1-9][0-9]{0,3}x[1-9][0-9]?(\+[1-9][0-9]{0,3}x[1-9][0-9]?){0,3}")
_LARGEST = 2**31  # inputs or outputs of one layer


@dataclasses.dataclass(frozen=True)
class LayerFormat:
    """What is stored of one weight [O, I].

    shape: (O, I). codebook: its size, "256x4" for K = 256 codewords of d = 4 weights, "256x4+256x4" for two stages.
    source: "shared" or "own". block: of the Hadamard rotation of the inputs; 0 where they are not rotated. rank: of the
    low-rank part, 0 for none. bias: True where the layer has one. kind: "linear" or "embedding" (rows are looked up).
    """

    shape: tuple[int, int]
    codebook: str = "256x4"
    source: str = "shared"
    block: int = 0
    rank: int = 0
    bias: bool = True
    kind: str = "linear"

    def __post_init__(self) -> None:
        sizes = isinstance(self.shape, (tuple, list)) and len(self.shape) == 2
        if not sizes or not all(type(size) is int and 0 < size < _LARGEST for size in self.shape):
            raise CheckpointError(f"A layer has shape {shown(self.shape)}; give [outputs, inputs], two whole numbers.")
        object.__setattr__(self, "shape", tuple(self.shape))
        inputs = self.shape[1]
        if not isinstance(self.codebook, str) or not _SIZE.fullmatch(self.codebook):
            raise CheckpointError(f"A layer has the codebook {shown(self.codebook)}; give a size such as 256x4.")
        if len({*self._stages}) != 1 or self.entries > 4096 or inputs % self.width:
            raise CheckpointError(
                f"The codebook {self.codebook} does not fit {inputs} inputs; stages of one size, at most 4096 "
                "codewords, and whole vectors are allowed."
            )
        if self.source not in SOURCES or self.kind not in KINDS or type(self.bias) is not bool:
            raise CheckpointError(
                f"A layer has source {shown(self.source)}, kind {shown(self.kind)} and bias {shown(self.bias)}; "
                f"allowed: {' or '.join(SOURCES)}, {' or '.join(KINDS)}, true or false."
            )
        if type(self.block) is not int or self.block < 0 or self.block & (self.block - 1):
            raise CheckpointError(f"A layer has rotation block {shown(self.block)}; give 0 or a power of two.")
        if self.block and inputs % self.block:
            raise CheckpointError(f"The rotation block {self.block} does not divide {inputs} inputs.")
        if type(self.rank) is not int or not 0 <= self.rank <= min(self.shape):
            raise CheckpointError(f"A layer of shape {list(self.shape)} has rank {shown(self.rank)}; give 0 or more.")

    @property
    def _stages(self) -> list[tuple[int, int]]:
        return [(int(a), int(b)) for a, b in (part.split("x") for part in self.codebook.split("+"))]

    @property
    def stages(self) -> int:
        return len(self._stages)

    @property
    def entries(self) -> int:
        """Codewords of one stage, K."""
        return self._stages[0][0]

    @property
    def width(self) -> int:
        """Weights of one codeword, d."""
        return self._stages[0][1]

    @property
    def book_shape(self) -> tuple[int, int, int]:
        """[S, K, d]."""
        return self.stages, self.entries, self.width

    @property
    def code_bits(self) -> int:
        """Bits of one packed code."""
        return next(bits for bits in BITS if self.entries <= 2**bits)

    @property
    def codes_per_row(self) -> int:
        return self.stages * self.shape[1] // self.width

    def tensors(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Name of each tensor in a file -> (shape, True where it holds bytes and False where it holds floats)."""
        outputs, inputs = self.shape
        found: dict[str, tuple[tuple[int, ...], bool]] = {
            "codes": ((outputs, packed_length(self.codes_per_row, self.code_bits)), True),
            "row_scale": ((outputs,), False),
        }
        if self.block:
            found["signs"] = ((-(-inputs // 8),), True)
        if self.source == "own":
            found["codebook"] = (self.book_shape, False)
        if self.rank:
            found |= {"low_rank_a": ((self.rank, inputs), False), "low_rank_b": ((outputs, self.rank), False)}
        return found

    def nbytes(self, float_bytes: int = 2) -> int:
        """Bytes of all that is stored of the weight, without bias and shared codebook."""
        total = 0
        for shape, holds_bytes in self.tensors().values():
            count = 1
            for size in shape:
                count *= size
            total += count if holds_bytes else count * float_bytes
        return total

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes() / (self.shape[0] * self.shape[1])

    def to_dict(self) -> dict[str, Any]:
        """As in config.json: fields that are at their default are left out."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {key: list(value) if key == "shape" else value for key, value in given.items() if value != defaults[key]}

    @staticmethod
    def from_dict(data: Any) -> LayerFormat:
        """Inverse of `to_dict`; raises CheckpointError for anything that is not one."""
        known = {field.name for field in dataclasses.fields(LayerFormat)}
        if not isinstance(data, Mapping) or not set(data) <= known or "shape" not in data:
            raise CheckpointError(f"A layer is described by {shown(data)}; give shape and any of {sorted(known)}.")
        return LayerFormat(**data)
