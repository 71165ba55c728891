"""Keep: what a long calibration has found so far, in files, so that it goes on where it stopped.

One file a layer and one for each state of a tuning, all written whole or not at all. A folder belongs to one job: the
settings, the model and the formats are its fingerprint, and other jobs are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dit_accel.errors import CheckpointError
from dit_accel.files import write_atomically
from dit_accel.quantization.install import tensors_of
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.storage import Stored


class Kept:
    """A folder of results; without a folder nothing is kept, and everything is made anew."""

    def __init__(self, folder: Path | None, job: Mapping[str, Any] | None = None):
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(job or {}, sort_keys=True, indent=1)
        path = folder / "job.json"
        if not path.exists():
            write_atomically(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise CheckpointError(
                f"{folder} holds what another job has found (see job.json there); give another folder, or delete it."
            )

    def _path(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.safetensors"

    def has(self, names: Sequence[str]) -> bool:
        """True where every one of these layers is kept."""
        return all((path := self._path(name)) is not None and path.exists() for name in names)

    def layer(self, name: str, format: LayerFormat, books: Mapping[str, Tensor], make: Callable[[], Stored]) -> Stored:
        """The codes of a layer: those kept, or what `make` gives, kept from now on. books: the shared codebooks."""
        tensors = self.read(name)
        if tensors is None:
            made = make()
            self.write(name, tensors_of(made, format))
            return made
        book = tensors["codebook"] if format.source == "own" else books[format.codebook]
        rank = (tensors["low_rank_a"], tensors["low_rank_b"]) if format.rank else None
        return Stored(
            tensors["codes"], tensors["row_scale"], tensors.get("signs"), book, rank, format.code_bits, format.shape,
            format.block,
        )  # fmt: skip

    def read(self, name: str) -> dict[str, Tensor] | None:
        """Tensors kept under a name; None where there are none."""
        path = self._path(name)
        if path is None or not path.exists():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); delete it, and it is made anew.") from None

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name, in place of those kept before."""
        path = self._path(name)
        if path is not None:
            write_atomically(path, save({key: value.detach().contiguous().cpu() for key, value in tensors.items()}))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and some of the values: tells one model from another."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].to(torch.float32).cpu()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
