"""Batch rendering: a manifest of items in, a folder of pictures out; nothing is lost, and nothing made twice.

Names are loaded on first use, so that help texts stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.render.engine import prepare as prepare
    from dit_accel.render.engine import render as render
    from dit_accel.render.fields import schema as schema
    from dit_accel.render.item import Item as Item
    from dit_accel.render.ledger import Entry as Entry
    from dit_accel.render.ledger import History as History
    from dit_accel.render.manifest import load_manifest as load_manifest
    from dit_accel.render.report import Report as Report

_HOMES = {
    "Entry": "ledger",
    "History": "ledger",
    "Item": "item",
    "Report": "report",
    "load_manifest": "manifest",
    "prepare": "engine",
    "render": "engine",
    "schema": "fields",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"dit_accel.render.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dit_accel.render' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
