"""Output: the one folder that the studio writes to; a folder of its own for each run, the oldest of which go.

Pictures are written as `dit-accel render` writes them, so they hold what they were made of, and are exact.
"""

from __future__ import annotations

import io
import secrets
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dit_accel.comparison import FPS
from dit_accel.files import write_atomically
from dit_accel.render.engine import prepare
from dit_accel.render.writer import describe, encode
from dit_accel.studio.catalogue import Model
from dit_accel.studio.export import POLICY_FILE, job, policy_json
from dit_accel.studio.outcome import Outcome
from dit_accel.video import rgb, write_mp4

AMPLIFIED = 4  # times, in the picture of the difference
_RUNS, _QUEUES = "runs", "queues"


@dataclass(frozen=True)
class Files:
    """Paths of what a run gave. plain, made, difference: PNG or MP4; downloads: all that is worth keeping."""

    plain: Path
    made: Path
    difference: Path
    downloads: tuple[Path, ...]


class Output:
    """root: the folder; most: runs, and queues, that are kept in it."""

    def __init__(self, root: Path, most: int = 200):
        self.root, self.most = root.resolve(), most
        for name in (_RUNS, _QUEUES):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def new_queue(self) -> Path:
        """An empty folder for a list of prompts."""
        return self._new(_QUEUES)

    def save(self, outcome: Outcome, model: Model) -> Files:
        """Write the files of a run."""
        folder = self._new(_RUNS)
        policy = folder / POLICY_FILE
        write_atomically(policy, policy_json(outcome.wanted.policy))
        ending = ".mp4" if outcome.is_video else ".png"
        plain, made = folder / f"plain{ending}", folder / f"accelerated{ending}"
        encode(plain, outcome.plain.pictures[0], _description(outcome, model, None), FPS)
        wanted = outcome.wanted
        encode(made, outcome.made.pictures[0], _description(outcome, model, wanted.policy_name or wanted.policy), FPS)
        difference = folder / f"difference{ending}"
        amplified = AMPLIFIED * (outcome.made.pictures[0] - outcome.plain.pictures[0]).abs()
        _write(difference, amplified)
        downloads = [plain, made, policy]
        if outcome.is_video:
            downloads += [_frames(plain, outcome.plain.pictures[0]), _frames(made, outcome.made.pictures[0])]
        return Files(plain, made, difference, tuple(downloads))

    def _new(self, kind: str) -> Path:
        """A folder whose name nobody can guess: files are served to whoever names them."""
        parent = self.root / kind
        folder = parent / secrets.token_hex(12)
        folder.mkdir()
        old = sorted(parent.iterdir(), key=lambda path: path.stat().st_mtime)[: -self.most]
        for path in old:
            shutil.rmtree(path, ignore_errors=True)
        return folder


def _write(path: Path, picture: Tensor) -> None:
    """An image [C, H, W] or a video [F, C, H, W] alone; values above 1 are white."""
    if picture.ndim == 4:
        write_mp4(path, picture, FPS)
    else:
        write_atomically(path, png(picture))


def png(image: Tensor) -> bytes:
    """An image [C, H, W] in [0, 1] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(rgb(image)).save(buffer, "PNG")
    return buffer.getvalue()


def _description(outcome: Outcome, model: Model, policy: Any) -> dict[str, Any]:
    """What stands in a picture's file: the same as if the exported command had written it."""
    row = job(outcome.wanted, model)
    request = prepare([row], model.folder, model.folder.parent, policy, arguments=dict(model.defaults))
    return describe(request.items[0], request.settings)


def _frames(video: Path, frames: Tensor) -> Path:
    """A zip of PNGs beside a video, whose own coding is lossy. frames: [F, C, H, W] in [0, 1]."""
    path = video.with_name(f"{video.stem}-frames.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for number, frame in enumerate(frames):
            archive.writestr(f"{video.stem}-{number:04d}.png", png(frame))
    return path
