"""Files that are not what they claim to be: one clear error each, by every way of loading, and no large allocation."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import dit_accel
from dit_accel import CheckpointError
from dit_accel.quantization.checkpoint import Contents, check, check_headers
from dit_accel.quantization.config import VQConfig
from dit_accel.quantization.headers import read_header
from dit_accel.weights.format import LayerFormat

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "single_transformer_blocks.1.proj_mlp"  # of 128 outputs and 32 inputs; dense in the checkpoint `own`
OWN = "transformer_blocks.1.ff.net.0.proj"  # 128 outputs, 32 inputs, codebook 60x16, rank 2
TERABYTE = 2**40
Change = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def no_large_allocation() -> Iterator[None]:
    """The peak of the process's memory stays within 64 MiB of where it was."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = peak()
    yield
    assert peak() - before < 64 * 1024, "KiB"


def peak() -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


# -------------------------------------------------------------------------------------------------- ways to change one


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Change:
    def apply(folder: Path) -> None:
        held = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def value(name: str, place: tuple[int, ...], given: float) -> Change:
    return tensors(lambda held: held[name].__setitem__(place, given))


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return tensors(lambda held: held.__setitem__(name, change(held[name]).contiguous()))


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """The header is written anew, the rest of the file stays."""

    def apply(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        data = json.loads(content[8 : 8 + length])
        change(data)
        text = json.dumps(data).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return apply


def entry(name: str, **fields: Any) -> Change:
    return header(lambda data: data[name].update(fields))


def raw(change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def config(change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        change(data["quantization_config"])
        (folder / "config.json").write_text(json.dumps(data))

    return apply


def layer(name: str = LAYER, **fields: Any) -> Change:
    return config(lambda data: data["layers"][name].update(fields))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"weight": [0.0] * 100}))


def zipped(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "weights")
    os.replace(folder / "weights", folder / WEIGHTS)


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def offsets(first: int, last: int) -> Change:
    def change(data: dict[str, Any]) -> None:
        old = data[f"{LAYER}.codes"]["data_offsets"]
        data[f"{LAYER}.codes"]["data_offsets"] = [old[0] + first, old[1] + last]

    return header(change)


def twice(data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].rstrip(b" ")
    text = text[:-1] + b"," + text[text.index(b'"') :]
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


CASES: dict[str, tuple[str, Change, str]] = {
    # the file as such
    "empty file": ("shared", raw(lambda b: b""), "no safetensors file, or cut off"),
    "seven bytes": ("shared", raw(lambda b: b[:7]), "no safetensors file, or cut off"),
    "cut in the header": ("shared", raw(lambda b: b[:2000]), "no safetensors file, or cut off"),
    "cut in the tensors": ("shared", raw(lambda b: b[:-100]), "outside the .* bytes of the file"),
    "bytes after the end": ("shared", raw(lambda b: b + bytes(16)), "16 bytes that belong to no tensor"),
    "header of a terabyte": ("shared", raw(lambda b: struct.pack("<Q", TERABYTE) + b[8:]), "no safetensors file"),
    "header of 2^64 - 1": ("shared", raw(lambda b: b"\xff" * 8 + b[8:]), "no safetensors file"),
    "header is no JSON": ("shared", raw(lambda b: b[:9] + b"#" + b[10:]), "not valid JSON"),
    "header of deep lists": (
        "shared", raw(lambda b: struct.pack("<Q", 100_006) + b'{"a":' + b"[" * 100_001), "not valid JSON",
    ),
    "header is no text": ("shared", raw(lambda b: b[:12] + b"\xff\xfe" + b[14:]), "not valid JSON"),
    "a tensor twice": ("shared", raw(twice), "a key is there twice"),
    "a pickle by that name": ("shared", pickled, "is a pickle"),
    "a file of torch.save by that name": ("shared", zipped, "is a pickle"),
    "only a .bin": ("shared", only_a_pickle, r"has only diffusion_pytorch_model\.bin, which is not read"),
    "no weights": ("shared", lambda folder: (folder / WEIGHTS).unlink(), "none of both"),
    # what the header claims
    "a tensor of a terabyte": (
        "shared", entry(f"{LAYER}.codes", shape=[2**20, 2**20], data_offsets=[0, TERABYTE]), "outside the .* bytes",
    ),
    "a shape of a terabyte": ("shared", entry(f"{LAYER}.codes", shape=[2**20, 2**20]), "takes 1099511627776 bytes"),
    "a shape beyond 64 bits": ("shared", entry(f"{LAYER}.codes", shape=[2**40, 2**40]), "takes 12089258196146"),
    "a negative size": ("shared", entry(f"{LAYER}.codes", shape=[-128, -8]), "list of whole numbers"),
    "a size of 1.5": ("shared", entry(f"{LAYER}.codes", shape=[1.5, 8]), "list of whole numbers"),
    "no shape": ("shared", header(lambda d: d[f"{LAYER}.codes"].pop("shape")), "dtype, shape and data_offsets"),
    "unknown dtype": ("shared", entry(f"{LAYER}.codes", dtype="F1"), "dtype 'F1'; known are"),
    "dtype is a list": ("shared", entry(f"{LAYER}.codes", dtype=["U8"]), "known are"),
    "offsets of one number": ("shared", entry(f"{LAYER}.codes", data_offsets=[0]), "lies at"),
    "offsets backwards": ("shared", entry(f"{LAYER}.codes", data_offsets=[2048, 1024]), "lies at"),
    "negative offsets": ("shared", entry(f"{LAYER}.codes", data_offsets=[-1024, 0]), "lies at"),
    "overlap": ("shared", offsets(-4, -4), "overlaps|leaves a gap"),
    "gap": ("shared", offsets(4, 4), "overlaps|leaves a gap"),
    # what the config says and the tensors do not
    "no codes": ("shared", tensors(lambda held: held.pop(f"{LAYER}.codes")), rf"lacks the tensor {LAYER}\.codes,"),
    "no scales": ("shared", tensors(lambda held: held.pop(f"{LAYER}.row_scale")), "lacks the tensor"),
    "no signs": ("shared", tensors(lambda held: held.pop(f"{LAYER}.signs")), "lacks the tensor"),
    "no bias": ("shared", tensors(lambda held: held.pop(f"{LAYER}.bias")), "lacks the tensor"),
    "no shared codebook": ("shared", tensors(lambda held: held.pop("vq_codebooks.256x4")), "lacks the tensor"),
    "no codebook": ("own", tensors(lambda held: held.pop(f"{OWN}.codebook")), "lacks the tensor"),
    "no low-rank part": ("own", tensors(lambda held: held.pop(f"{OWN}.low_rank_a")), "lacks the tensor"),
    "codes of 16 bits": ("shared", replaced(f"{LAYER}.codes", lambda t: t.short()), "is torch.int16 of shape"),
    "scales in double": ("shared", replaced(f"{LAYER}.row_scale", lambda t: t.double()), "is torch.float64"),
    "scales as bytes": ("shared", replaced(f"{LAYER}.row_scale", lambda t: t.byte()), "is torch.uint8"),
    "codes of fewer rows": ("shared", replaced(f"{LAYER}.codes", lambda t: t[:-1]), r"\[127, 8\]; by config.json"),
    "codes turned": ("shared", replaced(f"{LAYER}.codes", lambda t: t.T), r"shape \[8, 128\]; by config.json"),
    "a scale too many": ("shared", replaced(f"{LAYER}.row_scale", lambda t: torch.ones(129)), r"shape \[129\]"),
    "a codebook of 512": (
        "shared", replaced("vq_codebooks.256x4", lambda t: torch.ones(1, 512, 4)), r"vq_codebooks.256x4 is .*512, 4",
    ),
    "a dense weight beside codes": (
        "shared", tensors(lambda held: held.update({f"{LAYER}.weight": torch.ones(128, 32)})), "has no such tensor",
    ),
    "a codebook nobody uses": (
        "shared", tensors(lambda held: held.update({"vq_codebooks.16x4": torch.ones(1, 16, 4)})), "has no such tensor",
    ),
    "a rank the file has not": ("shared", layer(rank=2), "lacks the tensor"),
    "another codebook": ("shared", layer(codebook="64x2"), "lacks the tensor|by config.json"),
    # the config itself
    "unknown setting": ("shared", config(lambda d: d.update(entropy=True)), "'entropy'; format_version 1"),
    "format_version 2": ("shared", config(lambda d: d.update(format_version=2)), "format_version 2"),
    "no layers": ("shared", config(lambda d: d.update(layers=None)), "has no layers"),
    "layers are a list": ("shared", config(lambda d: d.update(layers=[1])), r"The layers are \[1\]"),
    "a layer without shape": ("shared", config(lambda d: d["layers"][LAYER].pop("shape")), f"The layer {LAYER} cannot"),
    "a layer of a terabyte": ("shared", layer(shape=[2**30, 2**30]), "by config.json"),
    "a layer beyond all": ("shared", layer(shape=[2**40, 2**40]), "give .outputs, inputs., two whole numbers"),
    "a block of 48": ("shared", layer(block=48), "power of two"),
    "bits of 7": ("shared", config(lambda d: d.update(bits=7)), "bits is 7"),
    "a layer the model has not": (
        "shared", config(lambda d: d["layers"].update({"blocks.7.to_q": d["layers"].pop(LAYER)})), "lacks the tensor",
    ),
    # what tensors hold
    "a code out of range": ("own", value(f"{OWN}.codes", (5, 0), 63), "A code is 63, and the codebook has 60 entries"),
    "bits after the last code": ("own", value(f"{OWN}.codes", (5, 1), 240), "bits after a row's last code|A code is"),
    "a scale that is NaN": ("shared", value(f"{LAYER}.row_scale", (3,), float("nan")), "row_scale cannot be used"),
    "an infinite scale": ("shared", value(f"{LAYER}.row_scale", (3,), float("inf")), "row_scale cannot be used"),
    "an infinite codeword": ("own", value(f"{OWN}.codebook", (0, 9, 3), float("inf")), "codebook cannot be used"),
    "a shared codeword that is NaN": ("shared", value("vq_codebooks.256x2", (0, 9, 1), float("nan")), "cannot be used"),
    "a low-rank part that is NaN": ("own", value(f"{OWN}.low_rank_b", (9, 1), float("nan")), "low_rank_b cannot be"),
    "a bias that is NaN": ("shared", value(f"{LAYER}.bias", (9,), float("nan")), "bias cannot be used"),
}  # fmt: skip

WAYS: dict[str, Callable[[Path], Any]] = {
    "check": check,
    "load_model": dit_accel.load_model,
    "from_pretrained": FluxTransformer2DModel.from_pretrained,
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_refused_by_every_way(case: str, copy_of: Any, request: pytest.FixtureRequest) -> None:
    which, change, message = CASES[case]
    folder = copy_of(request.getfixturevalue(which))
    change(folder)
    for way in WAYS.values():
        with pytest.raises(CheckpointError, match=message) as caught:
            way(folder)
        assert len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------------------------------ shards


def shard(change: Callable[[dict[str, Any], Path], Any]) -> Change:
    """The model is saved in shards, and their index changed."""

    def apply(folder: Path) -> None:
        FluxTransformer2DModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
        (folder / WEIGHTS).unlink()
        index = folder / f"{WEIGHTS}.index.json"
        data = json.loads(index.read_text())
        change(data, folder)
        index.write_text(json.dumps(data))

    return apply


def move(name: str) -> Callable[[dict[str, Any], Path], Any]:
    return lambda data, folder: data["weight_map"].update({f"{LAYER}.codes": name})


def placed(data: dict[str, Any]) -> str:
    """The shard of the layer's codes."""
    return data["weight_map"][f"{LAYER}.codes"]


SHARDS: dict[str, tuple[Change, str]] = {
    "a path upwards": (shard(move("../secret.safetensors")), "names the file '../secret.safetensors'"),
    "an absolute path": (shard(move("/etc/passwd")), "names the file '/etc/passwd'"),
    "a path with backslashes": (shard(move("..\\x.safetensors")), "names the file"),
    "a pickle": (shard(move("pytorch_model.bin")), "names the file 'pytorch_model.bin'"),
    "a number": (shard(move(3)), "names the file 3"),  # pyright: ignore[reportArgumentType]
    "a file that is not there": (shard(move("other.safetensors")), "which is not there"),
    "the wrong shard": (
        shard(lambda d, f: move(next(n for n in d["weight_map"].values() if n != placed(d)))(d, f)),
        "puts elsewhere|does not have it",
    ),
    "a tensor in no shard": (shard(lambda d, f: d["weight_map"].pop(f"{LAYER}.codes")), "puts elsewhere"),
    "a tensor that is nowhere": (
        shard(lambda d, f: d["weight_map"].update(other=d["weight_map"][f"{LAYER}.codes"])), "does not have it",
    ),
    "no weight_map": (shard(lambda d, f: d.pop("weight_map")), "lacks a weight_map"),
    "no metadata": (shard(lambda d, f: d.pop("metadata")), "lacks a weight_map or metadata"),
    "a lost shard": (shard(lambda d, f: next(f.glob("*-00001-of*")).unlink()), "which is not there"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARDS)
def test_bad_shards_are_refused_by_every_way(case: str, shared: Path, copy_of: Any) -> None:
    change, message = SHARDS[case]
    folder = copy_of(shared)
    change(folder)
    for way in WAYS.values():
        with pytest.raises(CheckpointError, match=message):
            way(folder)


# -------------------------------------------------------------------- what diffusers reads before it asks a quantizer


def rewritten(text: str) -> Change:
    return lambda folder: (folder / "config.json").write_text(text)


CONFIGS: dict[str, tuple[Change, str]] = {
    "no JSON": (rewritten("{"), "not valid JSON"),
    "a list": (rewritten("[]"), "holds list"),
    "too large": (rewritten("[" + " " * 17 * 2**20 + "]"), "more than 16 MiB"),
    "absent": (lambda folder: (folder / "config.json").unlink(), "There is no file"),
    "no class": (rewritten('{"sample_size": 8}'), "has no class name"),
    "a class of nobody": (rewritten('{"_class_name": "EvilModel"}'), "diffusers has no such model"),
    "a class that is no model": (rewritten('{"_class_name": "DDIMScheduler"}'), "diffusers has no such model"),
    "a class that is a path": (rewritten('{"_class_name": "os.system"}'), "has no class name"),
    "no quant_method": (config(lambda d: d.pop("quant_method")), "one with a quant_method is expected"),
    "another quant_method": (config(lambda d: d.update(quant_method="gguf")), "quant_method is 'gguf'"),
    "a number for a config": (rewritten('{"_class_name": "A", "quantization_config": 3}'), "the quantization_config 3"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_config_is_refused(case: str, shared: Path, copy_of: Any) -> None:
    change, message = CONFIGS[case]
    folder = copy_of(shared)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        dit_accel.load_model(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no folder"):
        dit_accel.load_model(tmp_path / "nothing")
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet"]}')
    with pytest.raises(CheckpointError, match="has no transformer"):
        dit_accel.load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update({"blocks.7.to_q": d.pop(LAYER)}), "has no such layer"),
        (lambda d: d[LAYER].update(bias=False), "has no such tensor"),
        (lambda d: d[LAYER].update(kind="embedding"), "embedding of shape"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(change: Any, message: str, shared: Path, copy_of: Any) -> None:
    folder = copy_of(shared)
    config(lambda data: change(data["layers"]))(folder)
    held = load_file(folder / WEIGHTS)
    renamed = {name.replace(LAYER, "blocks.7.to_q") if "such layer" in message else name: t for name, t in held.items()}
    save_file(renamed, folder / WEIGHTS)
    for way in (dit_accel.load_model, FluxTransformer2DModel.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            way(folder)


def test_pickles_are_not_read_where_they_are_asked_for(shared: Path, copy_of: Any) -> None:
    folder = copy_of(shared)
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only its safetensors files are read"):
        FluxTransformer2DModel.from_pretrained(folder, use_safetensors=False)


def test_checks_come_while_loading_where_the_place_of_the_files_is_not_known_before(
    shared: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_accel.quantization.quantizer.model_being_loaded", lambda: None)
    for which, case in ((shared, "no codes"), (shared, "codes of fewer rows"), (own, "a code out of range")):
        folder = tmp_path / case
        shutil.copytree(which, folder)
        CASES[case][1](folder)
        with pytest.raises(CheckpointError, match=CASES[case][2]):
            FluxTransformer2DModel.from_pretrained(folder)
    only_a_pickle(folder)
    with pytest.raises(CheckpointError, match="only safetensors files are read"):
        FluxTransformer2DModel.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------- the pieces


def test_bits_after_the_last_sign_are_seen() -> None:
    contents = Contents(VQConfig(layers={"a": LayerFormat((4, 12), block=4)}))
    contents.check("a.signs", [torch.tensor([255, 15], dtype=torch.uint8)])
    with pytest.raises(CheckpointError, match="bits after the last sign"):
        contents.check("a.signs", [torch.tensor([255, 31], dtype=torch.uint8)])


def test_tensors_are_read_as_they_were_written_whole_and_in_runs(tmp_path: Path) -> None:
    kinds = (torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool)
    held = {str(kind): torch.randn(7, 3, 5).to(kind) for kind in kinds} | {
        "one": torch.tensor(3.5),
        "none": torch.ones(0, 4),
    }
    save_file(held, tmp_path / "a.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "a.safetensors")
    assert set(entries) == set(held)
    for name, tensor in held.items():
        assert torch.equal(entries[name].read(), tensor)
        assert entries[name].read().dtype == tensor.dtype
        runs = list(entries[name].rows(100))
        assert tensor.numel() == 0 or torch.equal(torch.cat(runs) if tensor.ndim else runs[0], tensor)


def test_a_good_folder_is_described(shared: Path, dense: Path) -> None:
    found = check(shared)
    assert found.class_name == "FluxTransformer2DModel"
    assert found.config is not None and LAYER in (found.config.layers or {})
    assert check_headers(dense).config is None
    assert torch.equal(
        dit_accel.load_model(dense).state_dict()[f"{LAYER}.weight"], load_file(dense / WEIGHTS)[f"{LAYER}.weight"]
    )
