"""Progress: a bar with rate and remaining time on a terminal, plain lines elsewhere, or one JSON object a line."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO

from dit_accel.render.ledger import DONE, Entry

_EVERY = 5.0  # seconds between plain lines, at least, where nothing fails


class Progress:
    """total: items of this render; log_json: write JSON lines to `out` instead; stream: of bars and plain lines."""

    def __init__(self, total: int, log_json: bool = False, quiet: bool = False, stream: TextIO | None = None):
        self.total, self.log_json, self.quiet = total, log_json, quiet
        self.stream = stream or sys.stderr
        self.made = self.failed = 0
        self._started: float | None = None  # when work began: once the pipeline was there
        self._last = -_EVERY
        self._bar: Any = None

    def begin(self, **facts: Any) -> None:
        """Say what is going to be done."""
        if self.log_json:
            self._log("begin", **facts)
        elif not self.quiet and self.total and self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, unit="item", file=self.stream, smoothing=0.1)

    def done(self, entry: Entry) -> None:
        """Say what became of an item."""
        if self._started is None:
            self._started = time.monotonic() - entry.seconds * entry.batch
            if self._bar is not None:  # it counts from when the pipeline was still being loaded
                self._bar.start_t = self._bar.last_print_t = time.time() - entry.seconds * entry.batch
        self.made += entry.state == DONE
        self.failed += entry.state != DONE
        if self.log_json:
            facts = {"id": entry.id, "file": entry.file, "error": entry.error, "seconds": round(entry.seconds, 4)}
            self._log(entry.state, **{key: value for key, value in facts.items() if value != ""})
        elif self.quiet:
            return
        elif self._bar is not None:
            self._bar.update()
            if entry.error:
                self._bar.write(f"failed: {entry.id}: {entry.error}", file=self.stream)
        else:
            self._line(entry)

    def end(self, **facts: Any) -> None:
        """The render is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self.log_json:
            self._log("end", **facts)

    def _line(self, entry: Entry) -> None:
        now, count = time.monotonic(), self.made + self.failed
        assert self._started is not None
        if entry.error:
            print(f"failed: {entry.id}: {entry.error}", file=self.stream, flush=True)
        elif now - self._last >= _EVERY or count == self.total:
            self._last = now
            passed = max(now - self._started, 1e-9)
            left = duration((self.total - count) * passed / count)
            rate = f"{60 * count / passed:.1f} items a minute"
            print(f"{count}/{self.total}  {rate}, {left} left  {entry.file}", file=self.stream, flush=True)

    def _log(self, event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, "time": round(time.time(), 3)} | facts), flush=True)


def duration(seconds: float) -> str:
    """Seconds in words, such as "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
