"""The bench of attention rules: its points, what it measures of one, and its table."""

from pathlib import Path

import pytest

from dit_accel import BlockSparse, Policy
from dit_accel.attention.grid import TokenGrid
from dit_accel.bench.attention import (
    Row,
    at_density,
    grid_of_workload,
    measure,
    read_rows,
    rules,
    small,
    table,
    together,
    write_rows,
)
from dit_accel.bench.measure import load_workload

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("grid", [TokenGrid(1, 16, 16, 10, True), TokenGrid(13, 8, 8)], ids=["picture", "video"])
def test_every_point_is_a_policy_of_its_own_on_equal_terms(grid: TokenGrid) -> None:
    points = [(rule, setting, small(settings)) for rule, setting, settings in rules(grid, Path("gates.safetensors"))]
    assert len({(rule, setting) for rule, setting, _ in points}) == len(points)
    assert {(s.block_size, s.min_tokens, s.dense_steps, s.dense_layers) for _, _, s in points} == {(16, 0, 0.1, 0.0)}
    names = {rule for rule, _, _ in points}
    assert len(names) >= 17 and ("Radial" in names) == (grid.frames > 1)


def test_a_point_is_measured_and_the_plain_pipeline_stays_plain() -> None:
    workload = load_workload(ROOT / "pipelines" / "tiny-flux", 6, 1.0, 1)
    grid = grid_of_workload(workload)
    assert (grid.frames, grid.height, grid.width) == (1, 16, 16) and grid.text_length
    half = measure(workload, "a", "0.5", Policy(attention=small(BlockSparse(0.5))))
    most = measure(workload, "a", "0.9", Policy(attention=small(BlockSparse(0.9))))
    assert 0.5 <= half.density < most.density < 1 and half.flops_share < most.flops_share < 1
    assert half.density < half.work, "the search and the dense steps cost as well"
    assert half.psnr_worst <= half.psnr_mean < most.psnr_mean
    exact = measure(workload, "a", "1", Policy())
    assert exact.psnr_mean == float("inf") and exact.flops_share == 1.0


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [Row("a", "1", 0.4, 0.5, 0.9, 0.7, 20.0, 10.0), Row("a", "2", 0.6, 0.7, 0.95, 0.9, 30.0, 25.0)]
    rows.append(Row("fast alone", "", 1.0, 1.0, 0.25, 1.0, 40.0, 35.0))
    write_rows(rows, tmp_path / "x", {})
    assert read_rows(tmp_path / "x") == rows and read_rows(tmp_path / "y") == []
    assert at_density(rows[:2], 0.5) == pytest.approx((25.0, 17.5, 0.8)) and at_density(rows[:2], 0.7) is None
    text = (tmp_path / "x.md").read_text()
    assert text == table(rows)
    assert "| a | 20.0 / 10.0, 0.70 | 25.0 / 17.5, 0.80 | 30.0 / 25.0, 0.90 |" in text
    assert "| fast alone  | 1.00 | 1.00 | 0.25 | 40.0 / 35.0 |" in text


def test_caches_stand_alone_and_with_sparse_attention() -> None:
    policies = {(rule, setting): policy for rule, setting, policy in together(small(BlockSparse(0.5)))}
    assert policies["fast alone", ""] == Policy.named("fast")
    both = policies["fast and sparse", "0.35"]
    assert both.cache == Policy.named("fast").cache and both.attention is not None and both.attention.density == 0.35
