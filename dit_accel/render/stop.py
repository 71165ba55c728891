"""Stop: one interrupt finishes what is being made and stops, a second one stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether the render is to end. asked: by a signal, or by `ask()`."""

    def __init__(self) -> None:
        self.asked = False
        self.by_signal = False

    def ask(self) -> None:
        self.asked = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Take SIGINT and SIGTERM, in the main thread; elsewhere signals are none of ours."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        earlier = {number: signal.getsignal(number) for number in numbers}
        self.listen()
        try:
            yield self
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def listen(self) -> None:
        """Take the signals again after a library has taken them."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.by_signal:
            raise KeyboardInterrupt
        self.asked = self.by_signal = True
        word = "Ctrl-C" if number == signal.SIGINT else "the signal"
        sentence = f"\ndit-accel: Stopping once the present item is finished; {word} again stops at once.\n"
        os.write(2, sentence.encode())  # a print may have been interrupted, and cannot be entered twice
