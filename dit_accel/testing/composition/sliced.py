"""Circumstances of feature slicing: by itself, and on denoisers that are compiled by blocks or as a whole."""

from __future__ import annotations

from collections.abc import Callable

import dit_accel
from dit_accel.slicing import Slicing
from dit_accel.testing.composition.circumstance import Circumstance, Enter, Setting, both_ways
from dit_accel.testing.composition.compiled import around, blocks, in_place

SLICES = 3  # the last slice of a tiny pipeline's tokens is a smaller one


def sliced(setting: Setting) -> None:
    """Until the end of the cell, when every layer that was found has to have run in slices."""
    setting.undo.callback(_check, sliced_alone(setting))


def sliced_alone(setting: Setting) -> Slicing:
    """The same, where nothing will run."""
    return setting.undo.enter_context(dit_accel.slice_features(setting.pipe, SLICES))


def _check(slicing: Slicing) -> None:
    whole = [path for kind in slicing._kinds if not kind.by_token for path in kind.layers.values()]
    assert not whole, f"left whole, or not called: {', '.join(whole)}"


def in_turn(*enters: Callable[[Setting], object]) -> Enter:
    """One circumstance after the other."""

    def enter(setting: Setting) -> None:
        for one in enters:
            one(setting)

    return enter


_BOTH = ("wan", "flux")
_ROUNDING = {"rounding": 1e-5, "because": "products of fewer rows are summed in another order"}
_GRAPHS = {**_ROUNDING, "slow": True}
_BLOCKS, _IN_PLACE, _AROUND = (make(backend="eager") for make in (blocks, in_place, around))

_COMPILED = "Blocks of transformer are compiled, so their layers cannot be sliced"

CIRCUMSTANCES = (
    *both_ways("slice_features", sliced, pipelines=(*_BOTH, "qwenimage"), **_ROUNDING),
    *both_ways(
        "slice_features and compile_repeated_blocks()",
        in_turn(sliced, blocks(fullgraph=False, backend="eager")),
        pipelines=_BOTH,
        **_GRAPHS,
    ),
    *both_ways("slice_features and transformer.compile()", in_turn(sliced, _IN_PLACE), pipelines=_BOTH, **_GRAPHS),
    Circumstance(
        "slice_features and torch.compile(transformer), then apply", in_turn(sliced, _AROUND), _BOTH, **_GRAPHS
    ),
    *(
        Circumstance(f"{name}, then slice_features", in_turn(enter, sliced), _BOTH, impossible=_COMPILED)
        for name, enter in {
            "compile_repeated_blocks(fullgraph=True)": _BLOCKS,
            "transformer.compile()": _IN_PLACE,
            "torch.compile(transformer)": _AROUND,
        }.items()
    ),
    Circumstance(
        "slice_features, then compile_repeated_blocks(fullgraph=True)",
        in_turn(sliced_alone, _BLOCKS),
        _BOTH,
        impossible="sliced layers run outside of compiled code; call Slicing.remove() first",
    ),
)
