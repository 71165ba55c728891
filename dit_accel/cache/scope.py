"""Scope: what is skipped as one, and what is remembered of it.

A range (first, last) of places in the stack is skipped as one: its first blocks hand on their inputs, its last one
returns what the forecast puts in the range's place. A layer inside a block is skipped while the block itself runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.errors import PolicyError
from dit_accel.settings import Settings, setting

UNITS = ("model", "stack", "block", "attention", "mlp", "layers")
LAYERS = ("attention", "mlp", "layers")
Range = tuple[int, int]  # first and last place in the stack, both inclusive


@dataclass(frozen=True)
class Scope(Settings):
    """What is skipped as one. Important: `unit`. To tinker with: `carrier`, `last_blocks`; `blocks` and `boundary` are
    Delta-DiT's."""

    unit: str = setting(
        "stack",
        "model: the whole forward, whose output is as small as the latents; stack: the blocks behind the probe as one; "
        "block: each block by itself; attention, mlp, layers (both): those layers of every block, which itself runs",
        choices=UNITS,
    )
    carrier: str = setting(
        "residual",
        "remember what the unit adds to its input, or its output as it is",
        choices=("residual", "output"),
    )
    last_blocks: int = setting(
        0, "blocks at the end of the stack that run even when the rest is skipped (useful: 0 to 8)", minimum=0
    )
    blocks: int | None = setting(
        None, "length of the range that is skipped; null is all between probe and last blocks", minimum=1
    )
    boundary: float | None = setting(
        None,
        "share of the run after which the front blocks are skipped instead of the rear ones; null never changes over",
        minimum=0.0,
        maximum=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit != "stack" and (self.blocks is not None or self.boundary is not None):
            raise PolicyError(
                f"Scope.blocks and Scope.boundary shorten the unit 'stack', not {self.unit!r}; leave them out."
            )
        if self.unit in ("model", *LAYERS) and self.last_blocks:
            raise PolicyError(
                f"Scope.last_blocks is {self.last_blocks} with the unit {self.unit!r}, which has no last blocks; "
                "leave it out, or give the unit 'stack' or 'block'."
            )

    @property
    def is_model(self) -> bool:
        return self.unit == "model"

    @property
    def has_layers(self) -> bool:
        """True where blocks run and layers inside them are skipped."""
        return self.unit in LAYERS

    def skips_layer(self, kind: str) -> bool:
        """kind: "attention" or "mlp"."""
        return self.unit == kind or self.unit == "layers"


def ranges(scope: Scope, probe: int, places: int, progress: float = 0.0) -> tuple[Range, ...]:
    """The ranges of a stack with `places` blocks that may be skipped; progress: share of the run that is over.

    Delta-DiT (2406.01125): the rear blocks before the boundary, the front blocks from it on.
    """
    first, last = probe, places - scope.last_blocks - 1
    if first > last or scope.is_model or scope.has_layers:
        return ()
    if scope.unit == "block":
        return tuple((place, place) for place in range(first, last + 1))
    if scope.blocks is not None:
        length = min(scope.blocks, last - first + 1)
        if scope.boundary is not None and progress >= scope.boundary:
            return ((first, first + length - 1),)
        return ((last - length + 1, last),)
    return ((first, last),)
