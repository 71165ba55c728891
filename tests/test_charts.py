"""Pictures are read back from their files: right pixels in the right places, whole files or none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel.charts import CELL, COLOURS, GAP, LARGEST_SIDE, LEFT, MARGIN, comparison_grid, contact_sheet, strip_chart
from dit_accel.errors import DitAccelError
from dit_accel.stats import StepRecord

HEADING = 24  # height of the line of column titles, and of the title of a panel


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        return np.asarray(picture)


def record(step: int, blocks: str, branch: str = "cond", indicator: float | None = None) -> StepRecord:
    ran = blocks.count("#") + blocks.count("!")
    return StepRecord(0, "transformer", branch, step, None, "", "", indicator, None, ran, len(blocks), 1.0, 0.1, blocks)


def test_grid_shows_plain_accelerated_and_amplified_difference(tmp_path: Path) -> None:
    plain = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    accelerated = (plain + 0.1 * torch.rand(plain.shape)).clamp(0, 1)
    comparison_grid(plain, accelerated, tmp_path / "grid.png", amplify=5.0)
    pixels = read(tmp_path / "grid.png")
    scale = 4  # 32 pixels are enlarged to 128
    expected = [plain, accelerated, (5 * (accelerated - plain).abs()).clamp(0, 1)]
    for row in range(2):
        top = MARGIN + HEADING + row * (32 * scale + GAP)
        for column, images in enumerate(expected):
            left = MARGIN + column * (48 * scale + GAP)
            cell = pixels[top : top + 32 * scale, left : left + 48 * scale]
            image = (images[row] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(cell, image.repeat(scale, 0).repeat(scale, 1))
    assert pixels.shape == (MARGIN + HEADING + 2 * (128 + GAP), 2 * MARGIN + 3 * 192 + 2 * GAP, 3)


def test_contact_sheet_shows_evenly_chosen_frames_of_all_ways(tmp_path: Path) -> None:
    plain = torch.rand(12, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    accelerated, fewer = (plain + 0.1 * torch.rand(plain.shape)).clamp(0, 1), plain.flip(0)
    contact_sheet(plain, accelerated, fewer, tmp_path / "sheet.png", "a title", amplify=5.0, columns=4)
    pixels = read(tmp_path / "sheet.png")
    scale, left, top = 4, 110, MARGIN + 44
    for row, frames in enumerate([plain, accelerated, fewer, (5 * (accelerated - plain).abs()).clamp(0, 1)]):
        for column, index in enumerate((0, 4, 7, 11)):
            y, x = top + row * (32 * scale + GAP), left + column * (48 * scale + GAP)
            image = (frames[index] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            cell = pixels[y : y + 32 * scale, x : x + 48 * scale]
            np.testing.assert_array_equal(cell, image.repeat(scale, 0).repeat(scale, 1))
    assert pixels.shape[1] == left + 4 * (48 * scale + GAP) + MARGIN


def test_contact_sheet_of_few_large_and_broken_frames(tmp_path: Path) -> None:
    plain = torch.rand(2, 1, 400, 800)
    broken = torch.full_like(plain, float("nan"))
    contact_sheet(plain, broken, plain, tmp_path / "sheet.png", "a title " * 200)
    pixels = read(tmp_path / "sheet.png")
    assert pixels.shape == (MARGIN + 44 + 4 * (LARGEST_SIDE // 2 + GAP) + MARGIN, 110 + 2 * (320 + GAP) + MARGIN, 3)
    contact_sheet(plain[:1], plain[:1], plain[:1], tmp_path / "one.png")
    with pytest.raises(DitAccelError, match=r"\[2, 1, 400, 800\], \[1, 1, 400, 800\], \[2, 1, 400, 800\]"):
        contact_sheet(plain, plain[:1], plain, tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "sheet.png"]


def test_grid_of_gray_large_and_broken_images(tmp_path: Path) -> None:
    plain = torch.full((1, 1, 200, 200), 0.5)
    broken = plain.clone()
    broken[..., 100:] = float("nan")
    comparison_grid(plain, broken, tmp_path / "grid.png", labels=["a label " * 200])
    pixels = read(tmp_path / "grid.png")
    assert pixels.shape[1] == 2 * MARGIN + 3 * 200 + 2 * GAP  # large images keep their size, long labels are cut
    middle, left = pixels.shape[0] - 100, MARGIN + 200 + GAP
    assert pixels[middle, left + 50].tolist() == [128] * 3 and pixels[middle, left + 150].tolist() == [0] * 3


def test_grid_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 16, 16)
    for other in (image[:1], image[..., 1:], image[0]):
        with pytest.raises(DitAccelError, match=r"\[2, 3, 16, 16\]"):
            comparison_grid(image, other, tmp_path / "grid.png")
    with pytest.raises(DitAccelError, match="1 labels for 2 images"):
        comparison_grid(image, image, tmp_path / "grid.png", labels=["one"])
    assert not list(tmp_path.iterdir())


def test_strip_has_one_cell_for_each_step_and_block(tmp_path: Path) -> None:
    strip = ["####", "#---", "#~~~", "#!!!"]
    strip_chart([record(i, blocks) for i, blocks in enumerate(strip)], tmp_path / "strip.png")
    pixels = read(tmp_path / "strip.png")
    top = MARGIN + 24 + HEADING
    kinds = {"#": "compute", "-": "reuse", "~": "forecast", "!": "recompute"}
    cells: dict[str, np.ndarray] = {}
    for column, blocks in enumerate(strip):
        for row, symbol in enumerate(blocks):
            x, y = LEFT + column * CELL, top + row * CELL
            cell = pixels[y : y + CELL - 1, x : x + CELL - 1]
            assert tuple(cell[0, 0]) == COLOURS[kinds[symbol]], (column, row)
            np.testing.assert_array_equal(cell, cells.setdefault(symbol, cell))
    marks = {symbol: (cell != cell[0, 0]).any(-1).tobytes() for symbol, cell in cells.items()}
    assert len(set(marks.values())) == 4  # told apart without colour too
    assert (pixels[top, LEFT + 4 * CELL :] == 255).all()  # no fifth column


def test_strip_has_a_panel_for_each_branch_and_a_curve_below(tmp_path: Path) -> None:
    steps = [record(i, "####" if i % 2 else "#~~~", branch, 0.1 * i) for i in range(6) for branch in ("cond", "uncond")]
    strip_chart(steps[::2], tmp_path / "one.png")
    strip_chart(steps, tmp_path / "two.png")
    strip_chart(steps, tmp_path / "threshold.png", threshold=0.2)
    strip_chart([replace(step, indicator=None) for step in steps], tmp_path / "bare.png")
    heights = {path.stem: read(path).shape[0] for path in tmp_path.iterdir()}
    assert heights["two"] - MARGIN - 24 == 2 * (heights["one"] - MARGIN - 24)
    assert heights["bare"] < heights["two"] == heights["threshold"]
    one, lined = read(tmp_path / "two.png"), read(tmp_path / "threshold.png")
    below = MARGIN + 24 + HEADING + 4 * CELL + 20
    dark = [(picture[below : below + 52, LEFT : LEFT + 6 * CELL] == 34).all(-1).sum(1) for picture in (one, lined)]
    assert dark[0].max() < 10 and dark[1].max() > 5 * CELL  # the threshold is a line across


def test_strip_wants_one_run(tmp_path: Path) -> None:
    for steps in ([], [record(0, "##"), replace(record(1, "##"), run=1)]):
        with pytest.raises(DitAccelError, match="one run"):
            strip_chart(steps, tmp_path / "strip.png")
