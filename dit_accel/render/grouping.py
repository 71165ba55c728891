"""Grouping: which items may share a call; no framework is loaded for it."""

from __future__ import annotations

from collections.abc import Sequence

from dit_accel.render.fields import TEXTS
from dit_accel.render.item import Item, canonical


def key_of(item: Item) -> str:
    """Equal for items that may share a call: all but their texts and seeds is the same."""
    rest = {key: value for key, value in item.arguments.items() if key not in TEXTS}
    return canonical([rest, sorted(TEXTS & item.arguments.keys()), item.policy])


def batches_of(items: Sequence[Item], size: int) -> list[tuple[Item, ...]]:
    """Items that may share a call, together, at most `size` of them; groups in the order of their first items, so that
    a policy is put on once."""
    groups: dict[str, dict[str, list[Item]]] = {}
    for item in items:
        groups.setdefault(canonical(item.policy), {}).setdefault(key_of(item), []).append(item)
    return [
        tuple(alike[start : start + size])
        for shapes in groups.values()
        for alike in shapes.values()
        for start in range(0, len(alike), size)
    ]
