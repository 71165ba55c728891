"""Probe: how long a render will take and how large it will be, from one item that is made and thrown away."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.render.item import Item
from dit_accel.render.progress import duration
from dit_accel.render.report import megabytes
from dit_accel.render.settings import RenderSettings

_SHORT = 20.0  # seconds: a shorter item is made twice, as the first call does more than later ones


@dataclass(frozen=True)
class Estimate:
    """items: to make; item: that was probed; item_seconds, item_bytes: of it; seconds: of all, with `workers` at work;
    size: of all, in bytes with their sidecars; free: bytes on the disk of the output folder."""

    items: int
    item: str
    item_seconds: float
    item_bytes: int
    seconds: float
    size: int
    free: int
    workers: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        lines = [
            f"{self.items} items to make: about {duration(self.seconds)} with {self.workers} worker"
            f"{'s' * (self.workers != 1)}, and {megabytes(self.size)} of {megabytes(self.free)} that are free.",
            f"From one item, {self.item}: {duration(self.item_seconds)}, {megabytes(self.item_bytes)}; others by their "
            "steps, size and frames. Nothing was written.",
        ]
        if self.size > self.free:
            lines.append("The disk is too small for all of them.")
        return "\n".join(lines)


def estimate(settings: RenderSettings, items: Sequence[Item], workers: int, free: int, pipe: Any = None) -> Estimate:
    """Make the item of middle cost, in memory and a temporary folder alone.

    Raises ManifestError, and DitAccelError where that item fails.
    """
    from dit_accel.render.renderer import Renderer
    from dit_accel.render.writer import describe, encode

    with Renderer(settings, pipe=pipe) as renderer, tempfile.TemporaryDirectory() as folder:
        renderer.check(items)
        costs = {item.id: _cost(item, renderer.caller.steps_of(item)) for item in items}
        sizes = {item.id: _cost(item, 1) for item in items}
        item = sorted(items, key=lambda each: costs[each.id])[len(items) // 2]
        description, path, seconds = describe(item, settings), Path(folder) / "probe", 0.0
        for _ in range(2):
            started = time.perf_counter()
            ((rendered,),) = list(renderer.make([item]))
            if rendered.picture is None:
                raise DitAccelError(f"{item.place}: the probed item {item.id} failed: {rendered.error}")
            path = Path(folder) / ("probe.mp4" if rendered.picture.ndim == 4 else "probe.png")
            encode(path, rendered.picture, description, settings.fps)
            seconds = time.perf_counter() - started
            if seconds > _SHORT:
                break
        size = path.stat().st_size
        beside = len(str(description)) + 600
    return Estimate(
        items=len(items),
        item=item.id,
        item_seconds=round(seconds, 3),
        item_bytes=size,
        seconds=round(seconds * sum(costs.values()) / costs[item.id] / workers, 1),
        size=round(size * sum(sizes.values()) / sizes[item.id]) + beside * len(items),
        free=free,
        workers=workers,
    )


def _cost(item: Item, steps: int) -> float:
    """Grows with the item's work; what an item leaves to the pipeline's defaults is the same for all that do."""
    arguments = item.arguments
    pixels = arguments.get("height", 512) * arguments.get("width", 512)
    return steps * pixels * arguments.get("num_frames", 16)
