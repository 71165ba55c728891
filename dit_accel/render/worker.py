"""Worker: makes items that it is told by their ids; the same in a process of its own and in a Ray actor.

As a program (`python -m dit_accel.render.worker OUT NAME`) it reads requests from its input and answers on its output,
one JSON line each, and ends at once when its input does: then the render that started it is gone.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.render.ledger import DONE, Entry, History, Ledger
from dit_accel.render.lock import hold_as_worker
from dit_accel.render.settings import Job
from dit_accel.render.storage import ours, temporary_folder


class Worker:
    """out: the output folder, where the job is; name: of its ledger. What an earlier worker of this render finished
    before it was killed is not made again."""

    def __init__(self, out: str, name: str):
        self.job = Job.load(ours(Path(out)) / "job.jsonl")
        self.held = hold_as_worker(Path(out))
        from dit_accel.render.renderer import Renderer
        from dit_accel.render.writer import Writer

        self.renderer = Renderer(self.job.settings, name)
        self.ledger = Ledger(Path(out), name)
        self.writer = Writer(self.job.settings, temporary_folder(Path(out), name), name)
        self.settled = self._settled()

    def check(self) -> None:
        """Raise ManifestError where an item could not be made."""
        self.renderer.check(list(self.job.items.values()))

    def render(self, ids: Sequence[str], attempts: Mapping[str, int], again: bool = False) -> list[dict[str, Any]]:
        """Make items that may share a call; the ledger's entries of all of them. again: another worker had them."""
        if again:
            self.settled = self._settled()
        known = [self.settled[key] for key in ids if key in self.settled]
        items = [self.job.items[key] for key in ids if key not in self.settled]
        made = self.renderer.rendered(items, self.ledger, self.writer, attempts) if items else ()
        return [asdict(entry) for entry in (*known, *(entry for some in made for entry in some))]

    def _settled(self) -> dict[str, Entry]:
        settings = self.job.settings
        entries = History.read(Path(settings.out)).entries
        return {key: e for key, e in entries.items() if e.run == settings.run and e.state == DONE}


def main(out: str, name: str) -> int:
    """Serve requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the render decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()

    def answer(data: Mapping[str, Any]) -> None:
        print(json.dumps(data), file=answers, flush=True)

    try:
        worker = Worker(out, name)
        worker.check()
        answer({"ready": True})
        while True:
            request = json.loads(requests.get())
            answer({"entries": worker.render(request["ids"], request["attempts"], request["again"])})
    except DitAccelError as error:
        answer({"error": str(error), "kind": type(error).__name__})
    except ImportError as error:
        answer({"error": str(error), "kind": "ImportError", "name": error.name or ""})
    return 1


def _listen(requests: queue.Queue[str]) -> None:
    """Hand requests on; the end of the input is the end of the render, and of this process, whatever it is at."""
    for line in sys.stdin:
        requests.put(line)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
