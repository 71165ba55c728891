"""Safetensors files, their index and JSON, read with suspicion: sizes, dtypes, offsets and names are checked against
what lies in the folder before a byte of memory is set aside for a tensor."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import CheckpointError, shown

WEIGHTS = "diffusion_pytorch_model"  # stem of the files of every diffusers model
LARGEST_JSON = 16 * 2**20  # bytes of a header, an index or a config; models of 10 000 tensors take 1 MB
_CHUNK = 2**30  # bytes of one read; Linux reads at most 2 GB at a time
_PLAIN = re.compile(r"[\w.+-]+")
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, its dtype and shape, first byte, and number of bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own; a memory map would keep every page that was looked at resident."""
        return self._read(self.start, self.nbytes).view(self.dtype).reshape(self.shape)

    def rows(self, limit: int) -> Iterator[Tensor]:
        """The tensor in runs of rows of its first dimension, of at most `limit` bytes, or one row, each."""
        count = self.shape[0] if self.shape else 1
        size = self.nbytes // max(count, 1)
        step = max(limit // max(size, 1), 1)
        for first in range(0, count, step):
            number = min(step, count - first)
            data = self._read(self.start + first * size, number * size).view(self.dtype)
            yield data.reshape((number, *self.shape[1:])) if self.shape else data.reshape(())

    def _read(self, start: int, nbytes: int) -> Tensor:
        data = torch.empty(nbytes, dtype=torch.uint8)
        place = memoryview(data.numpy())  # pyright: ignore[reportArgumentType]
        with self.file.open("rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < nbytes:
                got = file.readinto(place[done : done + _CHUNK])
                if not got:
                    raise CheckpointError(f"{self.file} ends before its tensors do; get it again.")
                done += got
        return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of sensible size, no key twice."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}; give the folder of a saved diffusers model.")
    with path.open("rb") as file:
        text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise CheckpointError(f"{path} has more than {LARGEST_JSON // 2**20} MiB, too many for a config; get it again.")
    return _parse(text, str(path))


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{where} is not valid JSON ({shown(reason)}); get it again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} holds {type(found).__name__}; a JSON object is expected.")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """Name of each tensor in a safetensors file -> where it lies; reads the header alone.

    Raises CheckpointError where the file is no safetensors file, is cut off, or tensors overlap, leave gaps or claim
    more bytes than there are.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(9)
        length = int.from_bytes(first[:8], "little")
        if first[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
            raise CheckpointError(f"{path} is a pickle with the name of another format; only safetensors is read.")
        if len(first) < 9 or first[8:] != b"{" or length > min(LARGEST_JSON, size - 8):
            raise CheckpointError(
                f"{path} is no safetensors file, or cut off: {size} bytes with a header of {length}, where at most "
                f"{LARGEST_JSON} are allowed; get it again."
            )
        data = _parse(b"{" + file.read(length - 1), f"The header of {path}")
    start = 8 + length
    found = {
        name: _entry(path, name, fields, start, size - start) for name, fields in data.items() if name != "__metadata__"
    }
    position = start
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != position:
            word = "overlaps the one before" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: the tensor {shown(name)} {word}; the file is damaged.")
        position += entry.nbytes
    if position != size:
        raise CheckpointError(f"{path} has {size - position} bytes that belong to no tensor; the file is damaged.")
    return found


def _entry(path: Path, name: str, fields: Any, start: int, room: int) -> Entry:
    """One tensor of a header. start: first byte after the header. room: bytes after it."""
    where = f"{path}: the tensor {shown(name)}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is described by {shown(fields)}; dtype, shape and data_offsets are expected.")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where} has dtype {shown(dtype)}; known are {', '.join(_DTYPES)}.")
    if not _whole(shape) or len(shape) > 16:
        raise CheckpointError(f"{where} has shape {shown(shape)}; a list of whole numbers is expected.")
    if not _whole(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        raise CheckpointError(
            f"{where} lies at {shown(offsets)}, outside the {room} bytes of the file; it is damaged or cut off."
        )
    nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where} of shape {shown(shape)} and dtype {dtype} takes {shown(nbytes)} bytes and has "
            f"{offsets[1] - offsets[0]}; the file is damaged."
        )
    return Entry(path, _DTYPES[dtype], tuple(shape), start + offsets[0], nbytes)


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def entries_of(folder: Path, variant: str | None = None) -> dict[str, Entry]:
    """Name of each tensor of a saved model -> where it lies; from one file, or from those that the index names.

    variant: as in diffusers, a word in the names of the files, such as "fp16".
    """
    word = f".{variant}" if variant else ""
    single, index = folder / f"{WEIGHTS}{word}.safetensors", folder / f"{WEIGHTS}.safetensors.index{word}.json"
    if index.is_file():
        return _sharded(folder, index)
    if single.is_file():
        return read_header(single)
    found = sorted(file.name for file in folder.glob("*") if file.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"})
    there = f"only {', '.join(found[:3])}, which is not read because it can run code" if found else "none of both"
    raise CheckpointError(
        f"{folder} should have {single.name} or {index.name}, and has {there}; save the model with save_pretrained."
    )


def _sharded(folder: Path, index: Path) -> dict[str, Entry]:
    data = read_json(index)
    places, about = data.get("weight_map"), data.get("metadata")
    if not isinstance(places, dict) or not places or not isinstance(about, dict):
        raise CheckpointError(f"{index} lacks a weight_map or metadata; it is no index of shards.")
    files: dict[str, dict[str, Entry]] = {}
    for name in places.values():
        if not isinstance(name, str) or not _PLAIN.fullmatch(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names the file {shown(name)}; a .safetensors file beside it is expected.")
        if name not in files:
            if not (folder / name).is_file():
                raise CheckpointError(f"{index} names {name}, which is not there; get it again.")
            files[name] = read_header(folder / name)
    found: dict[str, Entry] = {}
    for name, entries in files.items():
        for tensor, entry in entries.items():
            if places.get(tensor) != name:
                raise CheckpointError(
                    f"{folder / name} has the tensor {shown(tensor)}, which {index.name} puts elsewhere."
                )
            found[tensor] = entry
    lost = sorted(set(places) - set(found))
    if lost:
        raise CheckpointError(f"{index} puts {shown(lost[0])} into {places[lost[0]]}, which does not have it.")
    return found
