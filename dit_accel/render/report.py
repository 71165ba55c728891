"""Report: what a render did, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dit_accel.render.item import Item
from dit_accel.render.ledger import DONE, FAILED, Entry
from dit_accel.render.progress import duration

_SHOWN_FAILURES = 20


@dataclass(frozen=True)
class Report:
    """items: of the manifest, or of this part of it; entries: the latest of each item that has one; made, newly_failed:
    in this render; seconds: of it; interrupted: it was told to stop; notes: sentences worth knowing.
    """

    out: str
    items: tuple[Item, ...] = field(repr=False)
    entries: Mapping[str, Entry] = field(repr=False)
    made: int
    newly_failed: int
    seconds: float
    interrupted: bool
    stopped: str = ""
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> int:
        return self._count(DONE)

    @property
    def failed(self) -> int:
        return self._count(FAILED)

    @property
    def left(self) -> int:
        return len(self.items) - self.done - self.failed

    def _count(self, state: str) -> int:
        return sum((entry := self.entries.get(item.id)) is not None and entry.state == state for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Numbers only, JSON-ready."""
        return {
            "out": self.out,
            "items": len(self.items),
            "done": self.done,
            "failed": self.failed,
            "left": self.left,
            "made": self.made,
            "newly_failed": self.newly_failed,
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted,
            "stopped": self.stopped,
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """Aligned text: counts, time and size, then what failed."""
        stood = [entry for item in self.items if (entry := self.entries.get(item.id)) and entry.state == DONE]
        size = sum(entry.size for entry in stood)
        spent = sum(entry.seconds for entry in stood)
        rows = [
            ("items", str(len(self.items)), ""),
            ("done", str(self.done), f"{self.made} in this render" if self.made else "all were there already"),
            ("failed", str(self.failed), "make them again with --retry-failed" if self.failed else ""),
            ("left", str(self.left), "run the same command again" if self.left else ""),
            ("time", duration(self.seconds), f"{duration(spent)} in the pipeline for all items"),
            ("size", megabytes(size), self.out),
        ]
        rows[1] = rows[1] if self.done else ("done", "0", "")
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{name:{widths[0]}}  {value:>{widths[1]}}  {note}".rstrip() for name, value, note in rows]
        failures = [item for item in self.items if (e := self.entries.get(item.id)) and e.state == FAILED]
        lines += [
            f"failed: {item.id} ({item.place}): {self.entries[item.id].error}" for item in failures[:_SHOWN_FAILURES]
        ]
        if len(failures) > _SHOWN_FAILURES:
            lines.append(f"... and {len(failures) - _SHOWN_FAILURES} more; the ledger has all.")
        lines += self.notes
        if self.stopped:
            lines.append(self.stopped)
        return "\n".join(lines)


def megabytes(size: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
