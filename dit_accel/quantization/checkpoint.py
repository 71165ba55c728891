"""Checkpoints of quantised models, checked: first what the headers claim, then every code and scale, in small runs."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.diffusers_bridge import class_name_of
from dit_accel.errors import CheckpointError, shown
from dit_accel.quantization.config import VQConfig
from dit_accel.quantization.headers import Entry, entries_of, read_json
from dit_accel.quantization.install import BOOKS
from dit_accel.quantization.plan import shared_sizes
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.packing import check_packed
from dit_accel.weights.rotation import unpack_signs

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_RUN = 4 * 2**20  # bytes of the codes that are looked at in one go


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A saved model as its files describe it: class_name of the model; config of the quantisation, None where weights
    are dense; entries: name of each tensor -> where it lies."""

    folder: Path
    class_name: str
    config: VQConfig | None
    entries: Mapping[str, Entry]


def check(folder: str | os.PathLike[str], *, variant: str | None = None) -> Checkpoint:
    """What a folder holds, everything checked: headers, then the contents of quantised layers in runs of a few MiB.

    Raises CheckpointError that says what is wrong.
    """
    found = check_headers(folder, variant=variant)
    if found.config is not None:
        contents = Contents(found.config)
        for name, entry in found.entries.items():
            if contents.knows(name):
                contents.check(name, entry.rows(_RUN))
    return found


def check_headers(folder: str | os.PathLike[str], *, variant: str | None = None) -> Checkpoint:
    """What a folder holds, by config.json and the headers alone: reads no tensor."""
    folder = Path(folder)
    path = folder / "config.json"
    data = read_json(path)
    class_name, given = class_name_of(data), data.get("quantization_config")
    if not isinstance(class_name, str) or not class_name.isidentifier():
        raise CheckpointError(f"{path} has no class name of a diffusers model: {shown(class_name)}.")
    config = None
    if given is not None:
        if not isinstance(given, Mapping) or "quant_method" not in given:
            raise CheckpointError(
                f"{path} has the quantization_config {shown(given)}; one with a quant_method is expected."
            )
        config = VQConfig.from_dict(given)
    entries = entries_of(folder, variant)
    if config is not None:
        check_entries(config, entries)
    return Checkpoint(folder, class_name, config, entries)


def expected(config: VQConfig) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name of each tensor of the quantised layers -> (shape, True where it holds bytes and False for floats)."""
    if config.layers is None:
        raise CheckpointError(
            "The quantization config has no layers, so nothing says what is quantised. If config.json is like that, "
            "get it again; to quantise a single file, load it dense and use dit_accel.apply(pipe, Policy(weights=...))."
        )
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    for name, made in config.layers.items():
        found |= {f"{name}.{part}": about for part, about in made.tensors().items()}
        if made.bias:
            found[f"{name}.bias"] = ((made.shape[0],), False)
    return found | {f"{BOOKS}.{size}": (shape, False) for size, shape in shared_sizes(config.layers).items()}


def check_entries(config: VQConfig, entries: Mapping[str, Entry]) -> None:
    """Raise CheckpointError unless the files have every tensor of the quantised layers, in its dtype and shape, and no
    other beside them."""
    wanted = expected(config)
    check_complete(set(wanted) - set(entries))
    for name, (shape, holds_bytes) in wanted.items():
        entry, kinds = entries[name], (torch.uint8,) if holds_bytes else FLOATS
        if entry.dtype not in kinds or entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: {name} is {entry.dtype} of shape {list(entry.shape)}; by config.json it is "
                f"{' or '.join(str(kind) for kind in kinds)} of shape {list(shape)}. The two do not belong together."
            )
    layers = config.layers or {}
    odd = [name for name in entries if name not in wanted and name.rpartition(".")[0] in {*layers, BOOKS}]
    if odd:
        raise CheckpointError(
            f"{entries[odd[0]].file}: {odd[0]} belongs to a quantised layer, and by config.json the layer has no such "
            "tensor. The two do not belong together."
        )


def check_complete(missing: Iterable[str]) -> None:
    """Raise CheckpointError where tensors are missing."""
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(
            f"The checkpoint lacks the tensor {names[0]}{more}, which by config.json it has; get it again, or save "
            "the model anew, without a LoRA."
        )


class Contents:
    """Checks what tensors hold: codes in range, bits after the last one zero, numbers finite."""

    def __init__(self, config: VQConfig):
        self._layers: dict[str, LayerFormat] = dict(config.layers or {})

    def knows(self, name: str) -> bool:
        """True for the tensors of quantised layers and for shared codebooks."""
        return name.rpartition(".")[0] in self._layers or name.startswith(f"{BOOKS}.")

    def check(self, name: str, runs: Iterable[Tensor]) -> None:
        """Raise CheckpointError for a bad value. runs: the tensor, in runs of its rows."""
        layer, _, part = name.rpartition(".")
        made = self._layers.get(layer)
        try:
            for values in runs:
                if made is None or part not in ("codes", "signs"):
                    _check_finite(values)
                elif part == "codes":
                    check_packed(values, made.code_bits, made.codes_per_row, made.entries)
                elif made.shape[1] % 8 and values.shape == (-(-made.shape[1] // 8),):
                    unpack_signs(values[-1:], made.shape[1] % 8)
        except CheckpointError as error:
            raise CheckpointError(f"The tensor {name} cannot be used. {error}") from None


def _check_finite(values: Tensor) -> None:
    if not math.isfinite(float(values.abs().max())):
        raise CheckpointError("It holds NaN or infinity; the file is damaged.")


def folder_of(path: str | os.PathLike[str]) -> Path:
    """The folder of a model: the path itself, or `transformer` in it where it is a pipeline's."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}; give that of a saved diffusers model or pipeline.")
    if (folder / "config.json").is_file() or not (folder / "model_index.json").is_file():
        return folder
    parts: dict[str, Any] = read_json(folder / "model_index.json")
    if "transformer" not in parts or not (folder / "transformer").is_dir():
        raise CheckpointError(f"The pipeline {folder} has no transformer; give the folder of the model in it.")
    return folder / "transformer"
