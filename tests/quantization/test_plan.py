"""Plan and known models: which layers are quantised, what each takes, and what large public models would save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dit_accel.errors import CheckpointError, PolicyError, UnsupportedModelError
from dit_accel.explain import explain
from dit_accel.known_models import KNOWN, skeleton
from dit_accel.quantization.install import add_codebooks, coded_like, encode_layer, put, remove_codebooks
from dit_accel.quantization.plan import is_modulation, plan, shared_sizes
from dit_accel.weights.codebook import universal
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.vector_quant import VectorQuant


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.Module()
        self.norm1.linear = nn.Linear(width, 6 * width)
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(width, width)
        self.attn.to_out = nn.ModuleList([nn.Linear(width, width, bias=False), nn.Dropout(0.0)])
        self.odd = nn.Linear(width - 1, width)


class Model(nn.Module):
    def __init__(self, width: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.embedder = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.proj_out = nn.Linear(width, width)


SMALL = VectorQuant(smallest=0)


def test_layers_inside_blocks_are_quantised_and_nothing_else() -> None:
    found = plan(Model(), SMALL)
    names = {"norm1.linear", "attn.to_q", "attn.to_out.0"}
    assert set(found) == {f"blocks.{number}.{name}" for number in range(4) for name in names}
    assert found["blocks.0.attn.to_q"] == LayerFormat((32, 32), "256x4", "shared", 32, 0, True)
    assert found["blocks.0.norm1.linear"].codebook == "256x2", "modulation at 4 bits"
    assert not found["blocks.0.attn.to_out.0"].bias


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"keep_first": 1}, {1, 2, 3}),
        ({"keep_last": 2}, {0, 1}),
        ({"keep_first": 1, "keep_last": 1}, {1, 2}),
    ],
)
def test_first_and_last_blocks_stay_dense(settings: dict[str, int], left: set[int]) -> None:
    found = plan(Model(), VectorQuant(smallest=0, **settings))
    assert {int(name.split(".")[1]) for name in found} == left


def test_layers_can_be_kept_by_name_and_by_size() -> None:
    assert not any("to_q" in name for name in plan(Model(), VectorQuant(smallest=0, dense=("to_q",))))
    assert set(plan(Model(), VectorQuant(smallest=2000))) == {f"blocks.{number}.norm1.linear" for number in range(4)}
    with pytest.raises(UnsupportedModelError, match="lower smallest"):
        plan(Model(), VectorQuant(smallest=10**6))


@pytest.mark.parametrize(
    ("settings", "codebook", "source", "block"),
    [
        (VectorQuant(bits=3, smallest=0), "64x2", "shared", 32),
        (VectorQuant(bits=4, smallest=0, codebook="layer"), "256x2", "own", 32),
        (VectorQuant(codebook="model", rotate=False, smallest=0), "256x4", "shared", 0),
        (VectorQuant(size="256x4+256x4", smallest=0), "256x4+256x4", "shared", 32),
        (VectorQuant(size="4096x4", codebook="layer", smallest=0), "4096x4", "own", 32),
    ],
)
def test_settings_become_formats(settings: VectorQuant, codebook: str, source: str, block: int) -> None:
    made = plan(Model(), settings)["blocks.1.attn.to_q"]
    assert (made.codebook, made.source, made.block) == (codebook, source, block)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 5}, {"modulation_bits": 1}, {"rotate": False}, {"low_rank": -1}, {"method": "gptq"}, {"scratch_mb": 0.0}],
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="VectorQuant"):
        VectorQuant(**settings)


def test_a_size_without_a_universal_codebook_is_refused() -> None:
    with pytest.raises(PolicyError, match="no universal codebook 4096x4"):
        plan(Model(), VectorQuant(size="4096x4", smallest=0))


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.3.norm1.linear",
        "transformer_blocks.3.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
        "transformer_blocks.0.img_mod.1",
        "layers.2.adaLN_modulation.0",
        "blocks.0.norm1.emb.timestep_embedder.linear_1",
    ],
)
def test_modulation_is_told_by_name(name: str) -> None:
    assert is_modulation(name)


@pytest.mark.parametrize("name", ["transformer_blocks.3.attn.to_q", "blocks.0.ffn.net.0.proj", "blocks.1.ff.net.2"])
def test_ordinary_layers_are_not_modulation(name: str) -> None:
    assert not is_modulation(name)


def test_tables_of_embeddings_get_four_bits() -> None:
    model = Model()
    for block in model.blocks:
        block.table = nn.Embedding(100, 32)
    made = plan(model, VectorQuant(smallest=0, modulation_bits=2))["blocks.0.table"]
    assert made == LayerFormat((100, 32), "256x2", "shared", 32, 0, False, "embedding")


def test_bytes_are_known_before_anything_is_quantised() -> None:
    layer = nn.Linear(96, 40)
    for size, rank in (("256x4", 0), ("64x2", 3), ("256x2", 0), ("256x4+256x4", 2), ("16x4", 0)):
        format = LayerFormat((40, 96), size, "own", 32, rank)
        made = encode_layer("layer", layer.weight.detach(), format, 0, None)
        assert made.nbytes == format.nbytes()
        assert LayerFormat.from_dict(json.loads(json.dumps(format.to_dict()))) == format


@pytest.mark.parametrize(
    "data",
    [
        {"shape": [4]},
        {"shape": [0, 4]},
        {"shape": [4, 6], "codebook": "256x4"},
        {"shape": [4, 8], "codebook": "8192x4"},
        {"shape": [4, 8], "codebook": "256x4+64x4"},
        {"shape": [4, 8], "codebook": "../x"},
        {"shape": [4, 8], "block": 3},
        {"shape": [4, 12], "block": 8},
        {"shape": [4, 8], "rank": 5},
        {"shape": [4, 8], "source": "file"},
        {"shape": [4, 8], "kind": "conv"},
        {"shape": [4, 8], "bias": 1},
        {"shape": [4, 8], "lookup": "x"},
        {"codebook": "256x4"},
        "256x4",
        None,
    ],
)
def test_formats_that_cannot_be(data: Any) -> None:
    with pytest.raises(CheckpointError):
        LayerFormat.from_dict(data)


def test_every_swap_has_its_opposite() -> None:
    model = Model()
    before = dict(model.named_modules())
    formats = plan(model, SMALL)
    books = add_codebooks(model, formats)
    taken = {}
    for name, format in formats.items():
        dense = model.get_submodule(name)
        made = coded_like(dense, format, books)
        book = universal(format.codebook)
        made.load(encode_layer(name, dense.weight.detach(), format, 0, book))  # pyright: ignore[reportArgumentType]
        taken[name] = put(model, name, made)
        assert made.bias is dense.bias
    assert all(model.get_submodule(name) is not before[name] for name in formats)
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        add_codebooks(model, formats)
    for name, dense in taken.items():
        put(model, name, dense)
    remove_codebooks(model)
    assert {name: id(module) for name, module in model.named_modules()} == {n: id(m) for n, m in before.items()}


# ------------------------------------------------------------------------------------------------------- known models

# Billions of weights as their publishers give them.
SIZES = {"flux.1-dev": 11.9, "sd3-medium": 2.0, "sd3.5-large": 8.1, "wan2.1-t2v-14b": 14.3, "wan2.1-t2v-1.3b": 1.42}
SIZES |= {"qwen-image": 20.4, "flux.1-schnell": 11.9, "dit-xl-2-256": 0.75}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_their_published_size_and_no_weights(name: str) -> None:
    model = skeleton(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert count == pytest.approx(SIZES[name], rel=0.04)
    formats = plan(model, VectorQuant())
    assert shared_sizes(formats)["256x4"] == (1, 256, 4)
    saved = sum(2 * made.shape[0] * made.shape[1] - made.nbytes() for made in formats.values())
    assert 4.5 < 2 * count * 1e9 / (2 * count * 1e9 - saved) < 8.0


def test_explain_counts_without_weights(tmp_path: Path) -> None:
    text = explain(skeleton("flux.1-dev"), "vq")
    assert "Weights of transformer: 494 layers" in text and "22.17 GiB become" in text and "Nothing is known" in text
    config = {"_class_name": "FluxTransformer2DModel", "num_layers": 2, "num_single_layers": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert "2 x FluxTransformerBlock" in explain(skeleton(str(path)), "vq")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "does not say of which class"),
        ('{"_class_name": "Nothing"}', "no model of"),
        ('{"_class_name": "FluxTransformer2DModel", "num_layers": "x"}', "cannot make"),
        (None, "cannot be read"),
    ],
)
def test_configs_that_cannot_be(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        skeleton(str(path))


def test_a_meta_tensor_is_all_that_a_skeleton_needs() -> None:
    with torch.device("meta"):
        model = Model()
    assert set(plan(model, SMALL)) == set(plan(Model(), SMALL))
