"""Contract: what one observed forward says about the calls between a denoiser and its blocks.

Learned by behaviour: the order of the calls, which input each output continues, and which run of calls is the stack
whose middle may be skipped. A refused contract says why, and the denoiser is then always computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from dit_accel.cache.scope import Range

Key = int | str  # where an argument stands: position or keyword


class ContractChanged(Exception):
    """A forward with skipped blocks left the learned contract: its result must not be used."""


@dataclass(frozen=True)
class Contract:
    """How the blocks of one denoiser are called for inputs of one shape.

    sequence: block numbers in call order; stack: positions in `sequence` that belong to the stack, in order;
    probe: how many of them run on every step; skippable: (share of the run that is over) -> ranges of places in the
    stack that may be skipped; roles: for each position of the stack, the argument that each output continues (`None`
    for one that continues none); structured: positions that return a tuple; stream: output of the probe that the
    indicator looks at, and the argument of the head that it continues; owners: the list that each place's block
    belongs to; possible_residuals: for each range, which outputs of its last block have the shape of what goes into it;
    layers: (place, name) -> kind of the layers inside blocks that may be skipped; repeated: positions whose block
    repeats one row for a batch, (output, rows) pairs; refusal: why nothing can be skipped.
    """

    sequence: tuple[int, ...]
    stack: tuple[int, ...] = ()
    probe: int = 1
    skippable: Callable[[float], tuple[Range, ...]] = lambda progress: ()
    roles: Mapping[int, tuple[Key | None, ...]] = field(default_factory=dict)
    structured: frozenset[int] = frozenset()
    stream: tuple[int, Key] = (0, 0)
    owners: tuple[str, ...] = ()
    possible_residuals: Mapping[Range, tuple[bool, ...]] = field(default_factory=dict)
    layers: Mapping[tuple[int, str], str] = field(default_factory=dict)
    repeated: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    refusal: str | None = None

    @cached_property
    def places(self) -> dict[int, int]:
        """Position in `sequence` -> place in the stack."""
        return {position: place for place, position in enumerate(self.stack)}

    def ranges(self, progress: float) -> tuple[Range, ...]:
        """Ranges of places that may be skipped at this share of the run."""
        return self.skippable(progress)

    def entry(self, position: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
        """What goes into a block, in the order of its outputs; `None` for an output that continues none of it."""
        try:
            values = [None if key is None else argument(key, args, kwargs) for key in self.roles[position]]
        except (IndexError, KeyError):
            raise ContractChanged(f"block call {position} lacks the argument that it had") from None
        for number, rows in self.repeated.get(position, ()):
            value = values[number]
            values[number] = None if value is None else value.expand(rows, *value.shape[1:])
        return tuple(values)

    def is_structured(self, one: Range) -> bool:
        """True where the last block of a range returns a tuple."""
        return self.stack[one[1]] in self.structured

    def residuals(self, one: Range, carrier: str = "residual") -> tuple[bool, ...]:
        """For each output of a range's last block: is its residual to what goes into the range kept, or itself?"""
        possible = self.possible_residuals[one]
        return possible if carrier == "residual" else tuple(False for _ in possible)

    def values(
        self, one: Range, entry: tuple[Tensor | None, ...], outputs: tuple[Any, ...], carrier: str
    ) -> tuple[Tensor | None, ...]:
        """What is remembered of a range that has run. entry: what went into it; outputs: of its last block."""
        kept: list[Tensor | None] = []
        for number, (output, residual) in enumerate(zip(outputs, self.residuals(one, carrier))):
            before = entry[number] if residual else None
            if output is None:
                kept.append(None)
            elif before is None:
                kept.append(output.clone())  # the model may go on to write into its own tensor
            else:
                kept.append(output - before)
        return tuple(kept)

    def side_tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Floating-point arguments of the first block that no output continues: embeddings of time and text."""
        streams = set(self.roles[self.stack[0]])
        pairs = [*enumerate(args), *kwargs.items()]
        return tuple(v for k, v in pairs if k not in streams and isinstance(v, Tensor) and v.is_floating_point())

    @property
    def probe_end(self) -> int:
        return self.stack[self.probe - 1]

    def pass_through(self, position: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a skipped block returns: its own inputs, in the structure of its outputs."""
        entry = self.entry(position, args, kwargs)
        return entry if position in self.structured else entry[0]


def argument(key: Key, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument of a call at a position or keyword."""
    return args[key] if isinstance(key, int) else kwargs[key]


def outputs_of(result: Any) -> tuple[Any, ...]:
    """The outputs of a block as a tuple, whether it returns one or several."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def shape_key(value: Any) -> Any:
    """What the anchors of a call depend on: the shapes, dtypes and devices of its tensors, and where it has none."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device.type, value.device.index)
    if isinstance(value, Mapping):
        return tuple((key, shape_key(item)) for key, item in sorted(value.items(), key=lambda pair: str(pair[0])))
    if isinstance(value, (tuple, list)):
        return tuple(shape_key(item) for item in value)
    return value if isinstance(value, (bool, str)) or value is None else type(value).__name__
