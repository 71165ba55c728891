"""The record of the matrix: complete, and what the document shows."""

from collections import Counter

from dit_accel.testing.composition import table
from dit_accel.testing.composition.matrix import EQUAL, GROUPS, REFUSED, WITHIN, cells
from dit_accel.testing.composition.mechanisms import MECHANISMS


def test_every_cell_is_recorded_and_has_one_outcome() -> None:
    record, names = table.read(), [cell.name for cell in cells()]
    assert list(record) == names and len(set(names)) == len(names) >= 250
    assert {outcome.kind for outcome in record.values()} == {EQUAL, WITHIN, REFUSED}
    for outcome in record.values():
        assert bool(outcome.sentence) == (outcome.kind != EQUAL)
        assert (outcome.distance > 0) == (outcome.kind == WITHIN)


def test_every_mechanism_meets_every_circumstance() -> None:
    counts = Counter(cell.mechanism.name for cell in cells())
    assert set(counts) == set(MECHANISMS) and len(set(counts.values())) == 1
    assert set(GROUPS) == {cell.group for cell in cells()}


def test_refusals_are_one_sentence() -> None:
    for outcome in table.read().values():
        if outcome.kind == REFUSED:
            assert "\n" not in outcome.sentence and len(outcome.sentence) < 300


def test_the_document_shows_the_record() -> None:
    written = table.DOCUMENT.read_text(encoding="utf-8").split(table.START)[1].split(table.END)[0]
    assert written.strip() == table.text(table.read()), "python -m dit_accel.testing.composition"
