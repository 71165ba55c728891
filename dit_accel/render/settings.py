"""Settings of a render: what all its items share; plain data, so that workers elsewhere can be told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.errors import ManifestError
from dit_accel.render.item import Item
from dit_accel.render.storage import ours, put, storing, sync_folder


@dataclass(frozen=True)
class RenderSettings:
    """pipeline: folder or hub id; out: output folder; dtype: of the weights; device: "auto" is the first accelerator;
    threads: of torch, `None` for its own choice; batch_size: most items of one call; fps: of videos, frames a second;
    fidelity: also make each item without the policy, and say how far it is from that; run: number of the render.
    """

    pipeline: str
    out: str
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    batch_size: int = 1
    fps: float = 16
    fidelity: bool = False
    run: int = 1

    @property
    def common(self) -> dict[str, Any]:
        """What decides over every picture, besides the pipeline's identity."""
        return {"dtype": self.dtype, "fps": self.fps}


@dataclass(frozen=True)
class Job:
    """What a worker has to know: the settings, and the items that it may be asked for by their ids."""

    settings: RenderSettings
    items: Mapping[str, Item] = field(repr=False)

    def save(self) -> Path:
        """Write it below the output folder, where every worker finds it; pictures and items then never travel."""
        folder = ours(Path(self.settings.out))
        lines = [asdict(self.settings), *(asdict(item) for item in self.items.values())]
        temporary, path = folder / "job.tmp", folder / "job.jsonl"
        with storing(path):
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        put(temporary, path)
        sync_folder(folder)
        return path

    @classmethod
    def load(cls, path: Path) -> Job:
        """Inverse of `save`. Raises ManifestError where the file is none of ours."""
        try:
            first, *rest = path.read_text(encoding="utf-8").splitlines()
            items: Sequence[Item] = [Item(**json.loads(line)) for line in rest]
            return cls(RenderSettings(**json.loads(first)), {item.id: item for item in items})
        except (OSError, ValueError, TypeError) as error:
            raise ManifestError(f"{path} cannot be read ({type(error).__name__}); start the render again.") from None
