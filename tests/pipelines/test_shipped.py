"""Shipped pipelines: they load as anyone would load them, are small, and make what they are asked for."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from dit_accel.bench.measure import load_workload
from dit_accel.features import FeatureExtractor
from dit_accel.quality import caption_satisfied

PIPELINES = Path(__file__).parents[2] / "pipelines"
SHIPPED = sorted(path.parent.name for path in PIPELINES.glob("*/model_index.json"))
LIMIT = 12_000_000  # bytes of weights


def test_all_kinds_are_there() -> None:
    kinds = {name: json.loads((PIPELINES / name / "model_index.json").read_text())["_class_name"] for name in SHIPPED}
    assert kinds == {
        "tiny-dit": "DiTPipeline",
        "tiny-flux": "FluxPipeline",
        "tiny-sd3": "StableDiffusion3Pipeline",
        "tiny-wan": "WanPipeline",
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_folder_is_complete_and_small(name: str) -> None:
    folder = PIPELINES / name
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == json.loads((folder / "model_index.json").read_text())["_class_name"]
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= LIMIT
    captions, prompts = ((folder / file).read_text().splitlines() for file in ("captions.txt", "prompts.txt"))
    assert len(prompts) == len(set(prompts)) == 32
    assert set(prompts) <= set(captions), "the benchmarks ask for what it was trained on"
    for file in ("README.md", "train.py", "training.json", "samples.png"):
        assert (folder / file).stat().st_size


@pytest.mark.parametrize("name", SHIPPED)
def test_samples_show_what_was_asked_for(name: str) -> None:
    workload = load_workload(PIPELINES / name, steps=12, items=5)
    samples = torch.cat([workload.image(item, 12) for item in range(5)])
    extractor = FeatureExtractor.from_pretrained(
        PIPELINES / f"{'shapes' if samples.ndim == 5 else 'fashion'}-classifier"
    )
    found = caption_satisfied(samples, [prompt or "" for prompt in workload.prompts], extractor)
    shares = {head: accuracy.share for head, accuracy in found.items()}
    assert shares["background"] == 1.0, shares
    assert min(shares.values()) >= 0.6, f"the benches record the shares of 200 samples; here of five: {shares}"
