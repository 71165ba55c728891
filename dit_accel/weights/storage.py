"""What a file holds for one vector-quantised weight, checked once, and the way back to numbers.

Codes are packed by row, the stages of a residual codebook one after the other. With signs, codes and low-rank part are
in rotated inputs: a forward pass rotates its activations and takes `rows_into`; `decode` goes all the way back.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError, CheckpointError
from dit_accel.weights.codebook import universal
from dit_accel.weights.encode import Encoded, look_up
from dit_accel.weights.packing import BITS, check_packed, pack, packed_length, unpack
from dit_accel.weights.rotation import block_of, unpack_signs, unrotate

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Stored:
    """One weight [O, I] as stored.

    codes: uint8 [O, ceil(S * I / d * bits / 8)]. row_scale: [O]. signs: uint8 [ceil(I / 8)], or None where inputs are
    not rotated. codebook: [S, K, d], or the name of a universal one. low_rank: ([r, I], [O, r]) or None. bits: of one
    code. shape: (O, I). block: of the rotation; 0 for the largest that fits.
    """

    codes: Tensor
    row_scale: Tensor
    signs: Tensor | None
    codebook: Tensor | str
    low_rank: tuple[Tensor, Tensor] | None
    bits: int
    shape: tuple[int, int]
    block: int = 0

    def __post_init__(self) -> None:
        outputs, inputs = self.shape
        if self.bits not in BITS:
            raise CheckpointError(f"Codes have {self.bits} bits; 4, 6, 8 and 12 can be read.")
        book = self.book()
        if book.ndim != 3 or not book.numel() or inputs % book.shape[2]:
            raise CheckpointError(
                f"The codebook has shape {list(book.shape)}; {inputs} inputs take [stages, entries, a divisor]."
            )
        _check_floats("codebook", book, tuple(book.shape))
        _check_floats("row_scale", self.row_scale, (outputs,))
        if self.codes.ndim != 2 or self.codes.shape[0] != outputs:
            raise CheckpointError(f"Codes have shape {list(self.codes.shape)}; {outputs} outputs have a row each.")
        check_packed(self.codes, self.bits, self._count(book), book.shape[1])
        if self.block and (self.block & (self.block - 1) or inputs % self.block):
            raise CheckpointError(f"The rotation's block is {self.block}, which does not fit {inputs} inputs.")
        if self.signs is not None:
            unpack_signs(self.signs, inputs)
        if self.low_rank is not None:
            first, second = self.low_rank
            rank = first.shape[0] if first.ndim else 0
            _check_floats("low_rank's first factor", first, (rank, inputs))
            _check_floats("low_rank's second factor", second, (outputs, rank))

    def book(self) -> Tensor:
        """The codebook -> [S, K, d]."""
        return universal(self.codebook) if isinstance(self.codebook, str) else self.codebook

    def rows_into(self, rows: slice, out: Tensor) -> Tensor:
        """Rows from codes and scales alone, in the inputs of the codes -> `out`, [rows, I], overwritten.

        At most as many rows as `out` has; the transient is 4 bytes a code.
        """
        book = self.book().to(out.device, out.dtype)
        codes = unpack(self.codes[rows], self.bits, self._count(book)).unflatten(1, (len(book), -1))
        view = out.view(-1, book.shape[2])
        torch.index_select(book[0], 0, codes[:, 0].flatten(), out=view)
        for stage in range(1, len(book)):
            view += book[stage].index_select(0, codes[:, stage].flatten())
        return out.mul_(self.row_scale[rows].to(out.dtype).unsqueeze(1))

    def decode(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the dense weight, in the layer's own inputs, low-rank part included -> float32 [rows, I]."""
        book = self.book().float()
        codes = unpack(self.codes[rows], self.bits, self._count(book)).unflatten(1, (len(book), -1))
        result = look_up(codes, book) * self.row_scale[rows].float().unsqueeze(1)
        if self.low_rank is not None:
            result += self.low_rank[1][rows].float() @ self.low_rank[0].float()
        if self.signs is None:
            return result
        inputs = self.shape[1]
        return unrotate(result, unpack_signs(self.signs, inputs), self.block or block_of(inputs))

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor; a universal codebook is the model's, and counts nothing here."""
        tensors = [self.codes, self.row_scale, *(self.low_rank or ())]
        tensors += [t for t in (self.signs, self.codebook) if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all that is stored, for each weight."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def _count(self, book: Tensor) -> int:
        return book.shape[0] * self.shape[1] // book.shape[2]


def store(made: Encoded, *, universal_name: str | None = None, signs: Tensor | None = None, block: int = 0) -> Stored:
    """Pack what was found, floats as bfloat16. made.codes: [O, S, n].

    universal_name: the universal codebook whose entries these are, kept by name. signs: uint8 [ceil(I / 8)], as packed.
    """
    _, entries, width = made.codebook.shape
    if universal_name is not None and not torch.equal(universal(universal_name), made.codebook.float().cpu()):
        raise ArgumentError(f"The codebook is not the universal {universal_name!r}; store it without a name.")
    bits = next((bits for bits in BITS if entries <= 2**bits), None)
    if bits is None:
        raise ArgumentError(f"A codebook of {entries} entries takes codes of more than 12 bits; give 4096 at most.")
    codes = pack(made.codes.flatten(1), bits)
    low_rank = None if made.low_rank is None else (made.low_rank[0].bfloat16(), made.low_rank[1].bfloat16())
    book = made.codebook.bfloat16() if universal_name is None else universal_name
    shape = (made.codes.shape[0], made.codes.shape[2] * width)
    return Stored(codes, made.row_scale.bfloat16(), signs, book, low_rank, bits, shape, block)


def stored_bytes(shape: tuple[int, int], bits: int, codes_per_row: int, *, rotated: bool, rank: int = 0) -> int:
    """Bytes that a weight (O, I) will take beside a universal codebook, known before any is quantised."""
    outputs, inputs = shape
    scales = 2 * outputs + 2 * rank * (outputs + inputs)
    return outputs * packed_length(codes_per_row, bits) + scales + (-(-inputs // 8) if rotated else 0)


def _check_floats(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if values.dtype not in _FLOATS or tuple(values.shape) != shape:
        raise CheckpointError(
            f"The {name} is {values.dtype} of shape {list(values.shape)}; it should be bfloat16, float16 or float32 of "
            f"shape {list(shape)}."
        )
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"The {name} holds NaN or infinity; the file is damaged.")
