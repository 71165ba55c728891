"""Table: the record of the matrix as JSON, and as the part of docs/composition.md between two marks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from dit_accel.files import write_atomically
from dit_accel.testing.composition.matrix import EQUAL, GROUPS, REFUSED, WITHIN, Cell, Outcome, cells, run
from dit_accel.testing.composition.mechanisms import MECHANISMS

ROOT = Path(__file__).parents[3]
RECORD, DOCUMENT = ROOT / "docs" / "results" / "composition.json", ROOT / "docs" / "composition.md"
START, END = "<!-- written by python -m dit_accel.testing.composition -->", "<!-- end -->"


def read() -> dict[str, Outcome]:
    """Cell name -> recorded outcome."""
    if not RECORD.exists():
        return {}
    return {name: Outcome(**outcome) for name, outcome in json.loads(RECORD.read_text(encoding="utf-8")).items()}


def check(cell: Cell) -> None:
    """Run a cell; AssertionError where it has another outcome than the recorded one."""
    made, recorded = run(cell), read().get(cell.name)
    assert recorded is not None, "python -m dit_accel.testing.composition"
    assert (made.kind, made.sentence) == (recorded.kind, recorded.sentence)


def write(record: dict[str, Outcome]) -> None:
    """Write the record, in the order of the matrix, and the table in the document."""
    known = {cell.name: record[cell.name] for cell in cells() if cell.name in record}
    lines = [
        f"{json.dumps(name)}: {json.dumps(asdict(outcome) | {'distance': _short(outcome.distance)})}"
        for name, outcome in known.items()
    ]
    write_atomically(RECORD, "{\n" + ",\n".join(lines) + "\n}\n")
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(START)
    write_atomically(DOCUMENT, f"{before}{START}\n{text(known)}\n{END}{rest.split(END)[1]}")


def _short(distance: float) -> float:
    return float(f"{distance:.2g}")


def text(record: dict[str, Outcome]) -> str:
    """The table of every group, the number of cells by outcome, and the sentences that the table points to."""
    notes: list[str] = []
    body = [line for group in GROUPS for line in _group(group, record, notes)]
    counts = Counter(outcome.kind for outcome in record.values())
    total = ", ".join(f"{counts[kind]} {kind}" for kind in (EQUAL, WITHIN, REFUSED))
    return "\n".join(
        [f"{len(record)} cells: {total}.", *body, "", *(f"{n}. {note}" for n, note in enumerate(notes, 1))]
    )


def _group(group: str, record: dict[str, Outcome], notes: list[str]) -> Iterator[str]:
    yield from ("", f"### {group[0].upper()}{group[1:]}", "")
    yield f"| circumstance | pipeline | {' | '.join(MECHANISMS)} |"
    yield f"|---|---|{'---|' * len(MECHANISMS)}"
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells(group):
        outcome = record.get(cell.name)
        rows.setdefault((cell.circumstance.name, cell.pipeline), []).append(_shown(outcome, notes))
    for (circumstance, pipeline), shown in rows.items():
        yield f"| {circumstance} | {pipeline} | {' | '.join(shown)} |"


def _shown(outcome: Outcome | None, notes: list[str]) -> str:
    if outcome is None:
        return "**untested**"
    if outcome.kind == EQUAL:
        return "equal"
    if outcome.sentence not in notes:
        notes.append(outcome.sentence)
    number = notes.index(outcome.sentence) + 1
    return f"{outcome.distance:.1g} ({number})" if outcome.kind == WITHIN else f"refused ({number})"
