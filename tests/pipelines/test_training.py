"""Training code of the shipped pipelines: seeded, resumable, and its hand-made parts are what they claim to be."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional

PIPELINES = Path(__file__).parents[2] / "pipelines"
sys.path.insert(0, str(PIPELINES))

from training import attention, autoencoders, fashion, shapes, text  # noqa: E402
from training.muon import Muon  # noqa: E402
from training.trainer import Trainer, rate_factor  # noqa: E402


def script(name: str) -> ModuleType:
    """The training script of a shipped pipeline, as a module."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), PIPELINES / name / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def small(name: str, **changes: Any) -> tuple[Any, Any]:
    """-> (class of the task, a config that trains in a moment)."""
    module = script(name)
    task, config = {
        "tiny-wan": lambda m: (m.TinyWan, m.WanConfig(blocks=2, hidden=32, still_steps=1, sparse_steps=2)),
        "tiny-dit": lambda m: (m.TinyDiT, m.DiTConfig(blocks=2, hidden=32)),
        "tiny-sd3": lambda m: (m.TinySD3, m.SD3Config(blocks=2, hidden=32)),
        "tiny-flux": lambda m: (m.TinyFlux, m.FluxConfig(double_blocks=1, single_blocks=1, hidden=32, heads=1)),
    }[name](module)
    batch = 34 if name == "tiny-wan" else 4  # frames
    return task, replace(config, steps=4, batch=batch, warmup=2, **changes)


needs_photos = pytest.mark.skipif(not fashion.DATASET.exists(), reason="apt-get install dataset-fashion-mnist")
TASKS = ["tiny-wan", *(pytest.param(n, marks=needs_photos) for n in ("tiny-dit", "tiny-sd3", "tiny-flux"))]


@pytest.mark.parametrize("name", TASKS)
def test_resumed_training_is_that_of_one_go(name: str, tmp_path: Path) -> None:
    task, config = small(name)

    def weights(folder: str, stops: list[int]) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir()
        found: dict[str, torch.Tensor] = {}
        for stop in stops:
            trainer = Trainer(task(config), config, tmp_path / folder)
            trainer.resume()
            while trainer.step < stop:
                trainer.train_step()
            trainer.save()
            found = trainer.ema
        return found

    once, twice = weights("once", [4]), weights("twice", [2, 4])
    start = dict(task(config).model.named_parameters())
    assert all(torch.equal(once[n], twice[n]) for n in once)
    assert any(not torch.equal(once[n], start[n]) for n in once), "training changed nothing"
    other = small(name, seed=1)
    with pytest.raises(SystemExit, match="use the same settings"):
        Trainer(other[0](other[1]), other[1], tmp_path / "once").resume()


@pytest.mark.parametrize("name", TASKS)
def test_frozen_parts_are_those_that_are_shipped(name: str) -> None:
    """Another training of the same script must speak the same language, or its seeds could not be compared."""
    from diffusers import DiffusionPipeline

    if not (PIPELINES / name / "model_index.json").exists():
        pytest.skip(f"{name} is in training")
    task, config = small(name)
    built = (made := task(config)).pipeline(made.model).components
    shipped = DiffusionPipeline.from_pretrained(PIPELINES / name).components
    frozen = [part for part in shipped if isinstance(shipped[part], torch.nn.Module) and part != "transformer"]
    assert "vae" in frozen
    for part in frozen:
        ours, theirs = built[part].state_dict(), shipped[part].state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), part


def test_published_pipeline_makes_what_the_average_makes(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    task, config = small("tiny-wan")
    trainer = Trainer(task(config), config, tmp_path)
    trainer.train_step()
    trainer.publish(tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    weights = dict(pipe.transformer.named_parameters())
    assert all(torch.equal(weights[name], average) for name, average in trainer.ema.items())
    assert (tmp_path / "out" / "captions.txt").read_text().splitlines() == list(shapes.CAPTIONS)
    assert all(file.stat().st_mode & 0o044 for file in (tmp_path / "out").rglob("*.safetensors")), "others may read"


def test_rate_rises_stays_and_falls_to_zero() -> None:
    _, config = small("tiny-wan")
    config = replace(config, steps=100, warmup=10, decay_fraction=0.2)
    assert [rate_factor(step, config) for step in (0, 9, 79, 90, 100)] == pytest.approx([0.1, 1, 1, 0.5, 0])


def test_orthogonalised_update_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 16, 16), (1, 8, 40), (1, 40, 8)):
        values = torch.linalg.svdvals(Muon.orthogonalise(torch.randn(shape)))
        assert (
            float(values.min()) > 0.3 and float(values.max()) < 1.4
        )  # the published coefficients do not converge to 1


def test_plain_attention_is_attention_and_is_taken_back() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, n, 16, dtype=torch.bfloat16) for n in (130, 70, 70))
    fused = functional.scaled_dot_product_attention
    expected = fused(q.float(), k.float(), v.float())
    with attention.plain_attention():
        assert functional.scaled_dot_product_attention is not fused
        found = functional.scaled_dot_product_attention(q, k, v)
        masked = functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert functional.scaled_dot_product_attention is fused
    assert float((found.float() - expected).abs().max()) < 0.02  # bfloat16 keeps three digits
    assert torch.equal(masked, fused(q, q, q, is_causal=True)), "calls with more to them go to torch"


def test_image_autoencoder_is_the_identity() -> None:
    vae, pictures = autoencoders.identity_autoencoder(), torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pictures).latents
        assert float((vae.decode(latents).sample - pictures).abs().max()) < 1e-6
    assert torch.allclose(latents * vae.config.scaling_factor, pictures, atol=1e-6)


def test_video_autoencoder_is_a_projection_of_patches() -> None:
    wan = script("tiny-wan")
    basis, mean = wan.principal_patches()
    assert torch.allclose(basis @ basis.T, torch.eye(wan.LATENTS), atol=1e-5), "noise keeps its strength"
    vae = autoencoders.linear_video_autoencoder(basis, mean, wan.SCALE)
    videos = shapes.draw_clips(4, 9, torch.Generator().manual_seed(1)).videos
    with torch.no_grad():
        latents = vae.encode(videos).latent_dist.sample()
        back = vae.decode(latents).sample
        again = vae.encode(back).latent_dist.sample()
    assert latents.shape == (4, 20, 9, 8, 8)
    assert torch.allclose(
        latents / wan.SCALE, wan.encode(videos, basis, mean), atol=1e-4
    )  # an offset of 20 costs two digits
    error = (back - videos).square().mean() / 4  # of a range of 2
    assert float(-10 * error.log10()) > 32, "PSNR in dB of the way there and back"
    assert float((again - latents).abs().mean()) < 0.02, "what is clamped to [-1, 1] was hardly outside"


@pytest.mark.parametrize("module", [fashion, shapes])
def test_tokenizer_knows_every_caption_and_encoders_tell_them_apart(module: ModuleType) -> None:
    tokenizer = text.build_tokenizer(module.CAPTIONS, module.TEXT_LENGTH)
    ids = tokenizer(list(module.CAPTIONS), padding="max_length", return_tensors="pt").input_ids
    assert ids.shape[1] == module.TEXT_LENGTH and not bool((ids == tokenizer.unk_token_id).any())
    text.seeded()
    encoder = text.build_t5(len(tokenizer))
    with torch.no_grad():
        vectors = encoder(ids).last_hidden_state.flatten(1)
    assert float(torch.pdist(vectors).min()) > 0.5


def test_clips_move_as_their_caption_says_and_stay_inside() -> None:
    clips = shapes.draw_clips(64, shapes.FRAMES, torch.Generator().manual_seed(3))
    paper = torch.tensor(list(fashion.BACKGROUNDS.values()))[clips.background].view(-1, 3, 1, 1, 1) * 2 - 1
    border = shapes.border_colours(torch.arange(shapes.FRAMES)) * 2 - 1
    blank = torch.where(shapes.is_border(), border, paper)
    ink = (clips.videos - blank).abs().amax(1) > 0.02  # [B, F, H, W]
    assert float(ink[..., 0, :].float().mean()) < 0.02 and float(ink[..., -1, :].float().mean()) < 0.02
    corner = clips.videos[:, :, :, 0, 0]
    assert float(corner[:, 0].diff(dim=1).min()) > 0.02, "the border tells time"
    assert float((clips.videos[:, 1, :, 0, -1] - corner[:, 1]).min()) > 1.9, "and right from left"
    assert float((clips.videos[:, 2, :, -1, 0] - corner[:, 2]).min()) > 1.9, "and down from up"
    axis = torch.arange(shapes.SIZE, dtype=torch.float32)
    mass = ink.float()
    x = (mass.sum(2) * axis).sum(-1) / mass.sum((2, 3))
    y = (mass.sum(3) * axis).sum(-1) / mass.sum((2, 3))
    moved = torch.stack([x[:, -1] - x[:, 0], y[:, -1] - y[:, 0]], dim=1)
    wanted = torch.tensor(list(shapes.DIRECTIONS.values()))[clips.direction]
    assert float((moved * wanted).sum(1).min()) > 11.5, "1 pixel a frame over 12 frames"
    assert float((moved - (moved * wanted).sum(1, keepdim=True) * wanted).abs().max()) < 0.5, "and nowhere else"
    again = shapes.draw_clips(64, shapes.FRAMES, torch.Generator().manual_seed(3))
    assert torch.equal(again.videos, clips.videos)


@needs_photos
def test_photos_wear_the_colours_of_their_caption() -> None:
    batch = fashion.Photos("t10k").draw(64, fashion.step_generator(0, 7))
    names = [fashion.CAPTIONS[i].split() for i in batch.caption.tolist()]
    assert [name[2] for name in names] == [fashion.NOUNS[i] for i in batch.noun.tolist()]
    corner = batch.pictures[:, :, 0, 0] / 2 + 0.5
    expected = torch.tensor([fashion.BACKGROUNDS[name[5]] for name in names])
    assert torch.allclose(corner, expected), "the padding is background"
    again = fashion.Photos("t10k").draw(64, fashion.step_generator(0, 7))
    assert torch.equal(again.noise, batch.noise) and torch.equal(again.pictures, batch.pictures)
