"""Batch rendering: a manifest of items in, a folder of pictures out; nothing is lost, and nothing made twice."""

from __future__ import annotations

from dit_accel.render.engine import prepare as prepare
from dit_accel.render.engine import render as render
from dit_accel.render.fields import schema as schema
from dit_accel.render.item import Item as Item
from dit_accel.render.ledger import Entry as Entry
from dit_accel.render.ledger import History as History
from dit_accel.render.manifest import load_manifest as load_manifest
from dit_accel.render.report import Report as Report

__all__ = ["Entry", "History", "Item", "Report", "load_manifest", "prepare", "render", "schema"]
