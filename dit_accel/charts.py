"""Charts: pictures side by side, and which block ran at which step. Pillow only; a file is complete or absent."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit_accel.files import write_atomically
from dit_accel.quality import QualityError
from dit_accel.stats import COMPUTE, FORECAST, PARTLY, RECOMPUTE, REUSE, SYMBOLS, StepRecord
from dit_accel.video import frame_psnr, rgb

INK, PALE, WHITE = (34, 34, 34), (214, 214, 214), (255, 255, 255)
# Okabe and Ito's palette, which colour-blind people tell apart; each also has a mark of its own.
COLOURS = {
    COMPUTE: (0, 114, 178),
    REUSE: (240, 228, 66),
    FORECAST: (230, 159, 0),
    RECOMPUTE: (204, 121, 167),
    PARTLY: (86, 180, 233),
}
NAMES = {
    COMPUTE: "computed",
    REUSE: "reused",
    FORECAST: "forecast",
    RECOMPUTE: "recomputed",
    PARTLY: "in part",
}
_KIND_OF = {symbol: kind for kind, symbol in SYMBOLS.items()}
SMALLEST_SIDE = 128  # pixels: smaller images are enlarged to about this
LARGEST_SIDE = 320  # pixels: larger frames are shrunk to this in a contact sheet
CELL, GAP, MARGIN, LEFT, CURVE = 13, 6, 12, 64, 56  # pixels


def comparison_grid(
    plain: Tensor,
    accelerated: Tensor,
    path: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    amplify: float = 4.0,
) -> None:
    """PNG with one row an image: plain | accelerated | absolute difference times `amplify`.

    plain, accelerated: [B, C, H, W] in [0, 1] with one or three channels; labels: one text above each row.
    """
    if plain.ndim != 4 or plain.shape != accelerated.shape or plain.shape[1] not in (1, 3) or not len(plain):
        raise QualityError(
            f"comparison_grid got images of shapes {list(plain.shape)} and {list(accelerated.shape)}; "
            "give two equal shapes [B, C, H, W] with 1 or 3 channels."
        )
    if labels is not None and len(labels) != len(plain):
        raise QualityError(f"comparison_grid got {len(labels)} labels for {len(plain)} images; give one for each.")
    difference = amplify * (accelerated.float() - plain.float()).abs()
    height, width = plain.shape[-2:]
    scale = max(1, math.ceil(SMALLEST_SIDE / min(height, width)))
    height, width = height * scale, width * scale
    heading, label_height = 24, 20 if labels else 0
    row_height = label_height + height + GAP
    canvas = Image.new("RGB", (2 * MARGIN + 3 * width + 2 * GAP, MARGIN + heading + len(plain) * row_height), WHITE)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(("plain", "accelerated", f"difference x {amplify:g}")):
        x = MARGIN + column * (width + GAP)
        draw.text((x, MARGIN), _fitting(title, width, 14), INK, _font(14))
    for row, images in enumerate(zip(plain, accelerated, difference)):
        y = MARGIN + heading + row * row_height
        if labels:
            draw.text((MARGIN, y + 2), _fitting(labels[row], canvas.width - 2 * MARGIN, 12), INK, _font(12))
        for column, image in enumerate(images):
            enlarged = _picture(image).resize((width, height), Image.Resampling.NEAREST)
            x, upper = MARGIN + column * (width + GAP), y + label_height
            draw.rectangle((x - 1, upper - 1, x + width, upper + height), outline=PALE)
            canvas.paste(enlarged, (x, upper))
    _save_png(canvas, path)


def contact_sheet(
    plain: Tensor,
    accelerated: Tensor,
    fewer: Tensor,
    path: str | os.PathLike[str],
    title: str = "",
    amplify: float = 4.0,
    columns: int = 9,
) -> None:
    """PNG of one video, at most `columns` frames at equal distances, first and last among them; rows: plain,
    accelerated, fewer steps, and the absolute difference of the first two times `amplify`.

    plain, accelerated, fewer: [F, C, H, W] in [0, 1] with one or three channels.
    """
    if plain.ndim != 4 or not plain.shape == accelerated.shape == fewer.shape or plain.shape[1] not in (1, 3):
        shapes = ", ".join(str(list(each.shape)) for each in (plain, accelerated, fewer))
        raise QualityError(f"contact_sheet got shapes {shapes}; give three equal [F, C, H, W] with 1 or 3 channels.")
    count = min(columns, len(plain))
    chosen = [round(index * (len(plain) - 1) / max(1, count - 1)) for index in range(count)]
    rows = {"plain": plain, "accelerated\n(PSNR on top)": accelerated, "fewer steps": fewer}
    rows[f"difference x {amplify:g}"] = amplify * (accelerated.float() - plain.float()).abs()
    levels = frame_psnr(accelerated[None], plain[None])[0].tolist()
    height, width = plain.shape[-2:]
    scale = max(1, math.ceil(SMALLEST_SIDE / min(height, width)))
    scale = min(scale, LARGEST_SIDE / max(height, width)) if scale == 1 else scale
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    left, top = 110, MARGIN + 44
    canvas = Image.new("RGB", (left + count * (width + GAP) + MARGIN, top + 4 * (height + GAP) + MARGIN), WHITE)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), _fitting(title, canvas.width - 2 * MARGIN, 14), INK, _font(14))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    for row, (name, frames) in enumerate(rows.items()):
        y = top + row * (height + GAP)
        draw.text((MARGIN, y), name, INK, _font(12))
        for column, index in enumerate(chosen):
            x = left + column * (width + GAP)
            if row == 0:
                level = "identical" if levels[index] == math.inf else f"{levels[index]:.1f} dB"
                draw.text((x, top - 18), _fitting(f"frame {index}: {level}", width, 12), INK, _font(12))
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=PALE)
            canvas.paste(_picture(frames[index]).resize((width, height), resample), (x, y))
    _save_png(canvas, path)


def strip_chart(
    steps: Sequence[StepRecord], path: str | os.PathLike[str], threshold: float | None = None, title: str = ""
) -> None:
    """PNG of one run: a panel for each denoiser and branch, a cell for each step (x) and block call (y, first on top).

    A cell shows by colour and by mark what was done. Below a panel: the indicator, where there is one, and `threshold`.
    """
    if not steps or len({step.run for step in steps}) != 1:
        runs = sorted({step.run for step in steps})
        raise QualityError(f"strip_chart got step records of {len(runs)} runs; give those of one run.")
    panels: dict[tuple[str, str], list[StepRecord]] = {}
    for step in steps:
        panels.setdefault((step.denoiser, step.branch), []).append(step)
    curve = CURVE if any(_numbers(records) for records in panels.values()) else 0
    heights = [24 + CELL * max(len(r.blocks) for r in records) + 18 + curve + MARGIN for records in panels.values()]
    top = MARGIN + (22 if title else 0) + 24
    width = max(LEFT + CELL * max(map(len, panels.values())) + MARGIN, 560)
    canvas = Image.new("RGB", (width, top + sum(heights)), WHITE)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), _fitting(title, width - 2 * MARGIN, 14), INK, _font(14))
    _legend(draw, top - 24, threshold if curve else None)
    for ((denoiser, branch), records), height in zip(panels.items(), heights):
        ran, total = sum(r.blocks_run for r in records), sum(r.blocks_total for r in records)
        share = f": {ran} of {total} block calls ran ({ran / total:.0%})" if total else ""
        draw.text((MARGIN, top), f"{denoiser}, branch {branch}{share}", INK, _font(13))
        _panel(draw, records, top + 24, threshold, curve)
        top += height
    _save_png(canvas, path)


def _panel(
    draw: ImageDraw.ImageDraw, records: Sequence[StepRecord], top: int, threshold: float | None, curve: int
) -> None:
    rows = max(len(record.blocks) for record in records)
    for row in range(0, rows, max(1, rows // 8)):
        draw.text((LEFT - 8, top + row * CELL), f"block {row}" if row == 0 else str(row), INK, _font(10), anchor="ra")
    for column, record in enumerate(records):
        x = LEFT + column * CELL
        for row, symbol in enumerate(record.blocks):
            _cell(draw, x, top + row * CELL, _KIND_OF[symbol])
        if column % 5 == 0:
            draw.text((x + CELL // 2, top + rows * CELL + 3), str(record.step), INK, _font(10), anchor="ma")
    draw.text((LEFT - 8, top + rows * CELL + 3), "step", INK, _font(10), anchor="ra")
    if curve:
        _indicator(draw, records, top + rows * CELL + 20, curve - 4, threshold)


def _cell(draw: ImageDraw.ImageDraw, x: int, y: int, kind: str) -> None:
    draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), COLOURS[kind])
    left, right, upper, lower = x + 3, x + CELL - 5, y + 3, y + CELL - 5
    middle = (upper + lower) // 2
    marks: dict[str, Callable[[], None]] = {
        COMPUTE: lambda: draw.rectangle((left + 1, upper + 1, right - 1, lower - 1), WHITE),
        REUSE: lambda: draw.line((left, middle, right, middle), INK, 2),
        FORECAST: lambda: draw.line((left, lower, right, upper), INK, 2),
        RECOMPUTE: lambda: draw.line((left, upper, right, lower, right, upper, left, lower), INK, 2),
        PARTLY: lambda: draw.rectangle((left + 1, middle, right - 1, lower - 1), WHITE),
    }
    marks[kind]()


def _legend(draw: ImageDraw.ImageDraw, top: int, threshold: float | None) -> None:
    x = MARGIN
    for kind, name in NAMES.items():
        _cell(draw, x, top + 2, kind)
        draw.text((x + CELL + 4, top), name, INK, _font(12))
        x += CELL + 20 + int(draw.textlength(name, _font(12)))
    if threshold is not None:
        draw.line((x, top + 8, x + 16, top + 8), INK)
        draw.text((x + 20, top), f"threshold {threshold:g}", INK, _font(12))


def _indicator(
    draw: ImageDraw.ImageDraw, records: Sequence[StepRecord], top: int, height: int, threshold: float | None
) -> None:
    """The indicator as a line over the steps; cut off at four times the threshold, so that the threshold is seen."""
    numbers = _numbers(records)
    if not numbers:
        return
    highest = max(numbers) if threshold is None else max(min(max(numbers), 4 * threshold), 1.2 * threshold)
    highest = highest or 1.0

    def level(value: float) -> float:
        return top + height * (1 - min(value, highest) / highest)

    right = LEFT + len(records) * CELL
    draw.line((LEFT, top + height, right, top + height), PALE)
    draw.text((LEFT - 8, top), f"{highest:.2g}", INK, _font(10), anchor="ra")
    draw.text((LEFT - 8, top + height), "change 0", INK, _font(10), anchor="rd")
    if threshold is not None:
        draw.line((LEFT, level(threshold), right, level(threshold)), INK)
    earlier: tuple[float, float] | None = None
    for column, record in enumerate(records):
        point = None
        if record.indicator is not None and math.isfinite(record.indicator):
            point = (LEFT + column * CELL + CELL / 2 - 1, level(record.indicator))
            draw.ellipse((point[0] - 2, point[1] - 2, point[0] + 2, point[1] + 2), COLOURS[COMPUTE])
            if earlier is not None:
                draw.line((*earlier, *point), COLOURS[COMPUTE], 1)
        earlier = point


def _numbers(records: Sequence[StepRecord]) -> list[float]:
    return [r.indicator for r in records if r.indicator is not None and math.isfinite(r.indicator)]


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(rgb(image))


def _fitting(text: str, width: int, size: int) -> str:
    """The text, cut to a width in pixels."""
    font, line = _font(size), " ".join(text[:width].split())
    if font.getlength(line) <= width:
        return line
    fewest, most = 0, len(line)  # so many letters fit, so many do not
    while most - fewest > 1:
        middle = (fewest + most) // 2
        fewest, most = (middle, most) if font.getlength(line[:middle] + "...") <= width else (fewest, middle)
    return line[:fewest] + "..."


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _save_png(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    write_atomically(path, buffer.getvalue())
