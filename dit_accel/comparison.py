"""Comparison: what `compare` measured, as data, as a table and as a folder of pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.charts import comparison_grid, contact_sheet, strip_chart
from dit_accel.errors import ArgumentError
from dit_accel.files import write_atomically
from dit_accel.quality import Summary
from dit_accel.stats import StepRecord
from dit_accel.video import write_mp4

_OPTIONAL = ("motion", "feature_distance", "satisfied")  # not measured of images, or without a classifier
FPS = 16  # frames a second of the videos that are written; what Wan was trained on
_GAP = 4  # pixels between videos side by side


@dataclass(frozen=True)
class Motion:
    """What a video says beyond its frames, see `video`. worst_frame_psnr: of all frames of the item; temporal_psnr and
    flicker: means over its videos, `None` under 2 and 3 frames.
    """

    worst_frame_psnr: float
    temporal_psnr: float | None
    flicker: float | None


@dataclass(frozen=True)
class Way:
    """One way of making one item, held against its plain run. Metrics are means over the item's pictures or frames.

    seconds: median; psnr: inf where all pictures are identical; ssim: `None` for pictures under 11 pixels a side;
    relative_l2: of the final latents, `None` where the pipeline does not show them; motion: `None` for images;
    feature_distance, satisfied (the classifier sees all that the caption says): `None` without a classifier, satisfied
    also where the caption says nothing that it knows.
    """

    steps: int
    flops_share: float
    compute_share: float
    seconds: float
    psnr: float
    ssim: float | None
    relative_l2: float | None
    motion: Motion | None = None
    feature_distance: float | None = None
    satisfied: bool | None = None


@dataclass(frozen=True)
class Item:
    """One prompt and seed. plain_satisfied: as `Way.satisfied`, of the plain run."""

    prompt: str | None
    seed: int
    plain_seconds: float
    accelerated: Way
    fewer: Way
    plain_satisfied: bool | None = None


@dataclass(frozen=True)
class Failure:
    """An item that could not be made under the policy, and why."""

    prompt: str | None
    seed: int
    error: str


@dataclass(frozen=True)
class MotionSummary:
    """Over the items; see `Motion` and `quality.Summary`."""

    worst_frame_psnr: Summary
    temporal_psnr: Summary | None
    flicker: Summary | None


@dataclass(frozen=True)
class WaySummary:
    """Means over the items; wall_ratio: median over the items of seconds / plain seconds; satisfied: share of the items
    that count; see `quality.Summary`."""

    steps: float
    flops_share: float
    compute_share: float
    wall_ratio: float
    psnr: Summary
    ssim: Summary | None
    relative_l2: Summary | None
    motion: MotionSummary | None = None
    feature_distance: Summary | None = None
    satisfied: float | None = None


@dataclass(frozen=True)
class Pictures:
    """The picture (of a video: the worst frame) of one item, each [1, C, H, W] in [0, 1]."""

    prompt: str | None
    seed: int
    psnr: float
    plain: Tensor
    accelerated: Tensor
    fewer: Tensor


@dataclass(frozen=True)
class Clip:
    """The videos of one item, each [F, C, H, W] in [0, 1]."""

    prompt: str | None
    seed: int
    plain: Tensor
    accelerated: Tensor
    fewer: Tensor


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. accelerated, fewer: summaries over `items`; state_bytes: peak memory of cached features;
    report: the session's own; pictures: of some items and of the worst one; clip: the worst item's, `None` for images;
    strip: step records of the first item.
    """

    pipeline: str
    policy_name: str | None
    policy: dict[str, Any]
    steps: int
    repeats: int
    threads: int
    arguments: dict[str, Any]
    accelerated: WaySummary
    fewer: WaySummary
    plain_seconds: float
    plain_satisfied: float | None
    state_bytes: int
    versions: dict[str, str]
    report: str
    items: tuple[Item, ...]
    failures: tuple[Failure, ...]
    pictures: tuple[Pictures, ...] = field(repr=False, compare=False)
    clip: Clip | None = field(repr=False, compare=False)
    strip: tuple[StepRecord, ...] = field(repr=False, compare=False)

    @property
    def worst(self) -> Item:
        """The item whose accelerated picture is farthest from the plain one."""
        return self.items[self.accelerated.psnr.worst_index]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready. Numbers that JSON cannot hold are null: a PSNR of null is that of identical pictures
        where `identical` says so, and of a picture that is not finite otherwise."""
        data = {name: value for name, value in vars(self).items() if name not in ("pictures", "clip", "strip")}
        data = _plain_data(data | {"worst": {"prompt": self.worst.prompt, "seed": self.worst.seed}})
        for row, item in zip(data["items"], self.items):
            row["accelerated"]["identical"] = item.accelerated.psnr == math.inf
            row["fewer"]["identical"] = item.fewer.psnr == math.inf
        for row in (data, *data["items"]):
            for way in (row["accelerated"], row["fewer"]):
                for name in _OPTIONAL:
                    if way[name] is None:
                        del way[name]
            if row["plain_satisfied"] is None:
                del row["plain_satisfied"]
        return data

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def table(self) -> str:
        """Aligned text: plain, accelerated and fewer steps, one line each, and what is needed to read them."""
        head = ("", "steps", "FLOPs", "blocks", "wall", "PSNR dB (95 %)", "worst", "SSIM", "worst", "latents rel. L2")
        plain = ("plain", str(self.steps), "1.000", "1.000", "1.00", "reference", "", "", "", "")
        ways = {"accelerated": self.accelerated, "fewer steps": self.fewer}
        lines = _aligned([head, plain, *(_row(name, way) for name, way in ways.items())])
        moving = [_motion_row(name, way.motion) for name, way in ways.items() if way.motion is not None]
        if moving:
            head = ("video", "worst frame dB", "worst", "temporal PSNR dB", "worst", "flicker", "worst")
            lines += _aligned([head, *moving])
        if self.accelerated.feature_distance is not None and self.fewer.feature_distance is not None:
            distances = (self.accelerated.feature_distance, self.fewer.feature_distance)
            head = ("classifier", "caption satisfied", "feature distance", "worst")
            lines += _aligned(
                [
                    head,
                    ("plain", _percent(self.plain_satisfied), "reference", ""),
                    *(
                        (name, _percent(way.satisfied), f"{distance.mean:.5f}", f"{distance.worst:.5f}")
                        for (name, way), distance in zip(ways.items(), distances)
                    ),
                ]
            )
        name = f'"{self.policy_name}"' if self.policy_name else "a policy of your own"
        lines.insert(0, f"{self.pipeline} with {name}, {len(self.items)} items, plain {self.plain_seconds:.2f} s each")
        lines.append(f"Worst accelerated: {_label(self.worst.prompt, self.worst.seed)}.")
        lines.append(f"Cached state: {self.state_bytes / 2**20:.2f} MiB at most.")
        lines += [
            f"{way}: {summary.identical} of {summary.count} items are identical to plain; PSNR is of the others."
            for way, summary in (("accelerated", self.accelerated.psnr), ("fewer steps", self.fewer.psnr))
            if summary.identical
        ]
        lines += [f"Failed: {_label(failure.prompt, failure.seed)}: {failure.error}" for failure in self.failures]
        used = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        lines.append(f"Wall: {self.repeats} interleaved timings an item, {self.threads} torch threads. {used}.")
        return "\n".join(line.rstrip() for line in lines)


def write_report(comparison: Comparison, folder: str | os.PathLike[str], fps: float = FPS) -> list[Path]:
    """Write comparison.json, table.txt, grid.png and strip.png into a folder, each complete or absent; their paths.

    Of videos the grid shows worst frames, and the worst item stands in sheet.png and, `fps` frames a second, in
    plain.mp4, accelerated.mp4, fewer.mp4 and side-by-side.mp4, which holds these three in this order.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"The folder {folder} cannot be made: {error.strerror}; give another one.") from None
    paths = [folder / name for name in ("comparison.json", "table.txt", "grid.png", "strip.png")]
    write_atomically(paths[0], (comparison.to_json() + "\n").encode())
    write_atomically(paths[1], f"{comparison.table()}\n\n{comparison.report}\n".encode())
    shown = comparison.pictures
    labels = [f"{_label(p.prompt, p.seed)}: {_decibel(p.psnr)} dB" for p in shown]
    comparison_grid(torch.cat([p.plain for p in shown]), torch.cat([p.accelerated for p in shown]), paths[2], labels)
    cache, first = comparison.policy["cache"], comparison.items[0]
    title = f"{comparison.policy_name or 'policy'}: {_label(first.prompt, first.seed)}"
    strip_chart(comparison.strip, paths[3], cache and cache["threshold"], title)
    return paths if comparison.clip is None else paths + _write_clip(comparison.clip, folder, fps)


def _write_clip(clip: Clip, folder: Path, fps: float) -> list[Path]:
    sheet = folder / "sheet.png"
    contact_sheet(clip.plain, clip.accelerated, clip.fewer, sheet, f"Worst: {_label(clip.prompt, clip.seed)}")
    gap = torch.ones(*clip.plain.shape[:-1], _GAP)
    videos = {
        "plain": clip.plain,
        "accelerated": clip.accelerated,
        "fewer": clip.fewer,
        "side-by-side": torch.cat([clip.plain, gap, clip.accelerated, gap, clip.fewer], dim=-1),
    }
    for name, frames in videos.items():
        write_mp4(folder / f"{name}.mp4", frames, fps)
    return [sheet, *(folder / f"{name}.mp4" for name in videos)]


# ----------------------------------------------------------------------------------------------------------- the text


def _row(name: str, way: WaySummary) -> tuple[str, ...]:
    level, similar, distance = way.psnr, way.ssim, way.relative_l2
    interval = "" if math.isinf(level.mean) else f" ({level.low:.2f} to {level.high:.2f})"
    return (
        name,
        f"{way.steps:.3g}",
        f"{way.flops_share:.3f}",
        f"{way.compute_share:.3f}",
        f"{way.wall_ratio:.2f}",
        _decibel(level.mean) + interval,
        _decibel(level.worst),
        f"{similar.mean:.4f}" if similar else "-",
        f"{similar.worst:.4f}" if similar else "-",
        f"{distance.mean:.4f}" if distance else "-",
    )


def _motion_row(name: str, motion: MotionSummary) -> tuple[str, ...]:
    frame, change, unrest = motion.worst_frame_psnr, motion.temporal_psnr, motion.flicker
    return (
        name,
        _decibel(frame.mean),
        _decibel(frame.worst),
        _decibel(change.mean) if change else "-",
        _decibel(change.worst) if change else "-",
        f"{unrest.mean:.5f}" if unrest else "-",
        f"{unrest.worst:.5f}" if unrest else "-",
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, the first one flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def _decibel(level: float) -> str:
    return "identical" if level == math.inf else f"{level:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _label(prompt: str | None, seed: int) -> str:
    return f"seed {seed}" if prompt is None else f'"{prompt}", seed {seed}'


def _plain_data(value: Any) -> Any:
    """JSON-ready: dataclasses and tuples become dictionaries and lists, tensors their shape, inf and NaN null."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_data(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    return value if isinstance(value, (str, int)) or value is None else f"<{type(value).__name__}>"
