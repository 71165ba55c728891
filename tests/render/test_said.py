"""What a render says while it is at work, and at its end."""

import functools
import io

import pytest
import tqdm

from dit_accel.render.item import Item
from dit_accel.render.ledger import DONE, FAILED, Entry
from dit_accel.render.progress import Progress, duration
from dit_accel.render.report import Report, megabytes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm, "tqdm", functools.partial(tqdm.tqdm, disable=False))  # tests have no bars otherwise
    stream = Terminal()
    progress = Progress(3, stream=stream)
    progress.begin()
    for number in range(3):
        progress.done(Entry(f"i{number}", DONE, 1, seconds=2.0, file=f"i{number}.png"))
    progress.end()
    assert "3/3" in stream.getvalue() and "100%" in stream.getvalue()


def test_plain_lines_elsewhere() -> None:
    stream = io.StringIO()
    progress = Progress(3, stream=stream)
    progress.begin()
    progress.done(Entry("a", DONE, 1, seconds=2.0, file="a.png"))
    progress.done(Entry("b", FAILED, 1, error="It broke."))
    progress.done(Entry("c", DONE, 1, seconds=2.0, file="c.png"))
    first, failed, last = stream.getvalue().splitlines()
    assert first.startswith("1/3  30.0 items a minute, 4.0 s left  a.png") and failed == "failed: b: It broke."
    assert last.startswith("3/3") and last.endswith("0.0 s left  c.png")


def test_the_table_counts_and_names_failures() -> None:
    items = tuple(
        Item(name, 0, {"prompt": name}, None, name, None, f"jobs.csv, line {n}") for n, name in enumerate("abc")
    )
    entries = {"a": Entry("a", DONE, 1, size=2000, seconds=90.0), "b": Entry("b", FAILED, 1, error="It broke.")}
    report = Report("out", items, entries, 1, 1, 100.0, False, notes=("One thing.",))
    assert (report.done, report.failed, report.left) == (1, 1, 1)
    lines = report.table().splitlines()
    assert lines[1].split() == ["done", "1", "1", "in", "this", "render"] and "--retry-failed" in lines[2]
    assert lines[-2:] == ["failed: b (jobs.csv, line 1): It broke.", "One thing."]
    assert report.to_dict()["left"] == 1


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.2, "59 s"), (60, "1 min"), (7500, "2 h 5 min")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes_in_words() -> None:
    assert [megabytes(size) for size in (12, 1500, 2e6, 3e9, 4e12)] == ["12 B", "1.5 kB", "2.0 MB", "3.0 GB", "4.0 TB"]
