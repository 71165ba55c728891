"""The cells of the matrix in which a pipeline is offloaded, cast, sliced, saved, copied, shared."""

import pytest

from dit_accel.testing.composition.matrix import Cell, cells
from dit_accel.testing.composition.table import check

CELLS = [
    pytest.param(cell, id=cell.name, marks=[pytest.mark.slow] if cell.slow else [])
    for cell in cells("offload and memory", "feature slicing", "life of the objects")
]


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_has_the_recorded_outcome(cell: Cell) -> None:
    if cell.circumstance.needs:
        pytest.importorskip(cell.circumstance.needs)
    check(cell)
