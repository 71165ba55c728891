"""Train `tiny-wan`: a really trained, small text-to-video `WanPipeline` (flow matching, Liu et al. 2209.03003).

    python pipelines/tiny-wan/train.py --bf16 --compile --work runs/tiny-wan --out pipelines/tiny-wan

Data: procedural clips of a moving shape (`training/shapes.py`), "a red circle moving left on a black background".
First last frames alone, then early ones among them; then three frames of a clip, far apart; then whole clips. What was
learned on the way:
- All on whole clips it learns colour and background only; frames in a row teach it to stand still.
- "Left" tells nothing of where a shape is, only together with the time, so nothing leads there step by step. Of last
  frames it does tell, and is learned in 200 steps; early frames and triples then add the time, and must not outweigh.
- Wan has no absolute positions: the colour of a border says where a token lies, and when.
- The gates of the blocks have to start open.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.autoencoders import PATCH, linear_video_autoencoder
from training.fashion import step_generator, without_some
from training.pictures import save_picture
from training.shapes import CAPTIONS, FRAMES, SIZE, TEXT_LENGTH, draw_clips, sample_captions
from training.text import WIDTH, build_t5, build_tokenizer, seeded
from training.trainer import TrainConfig, main

LATENTS = 20  # of the 48 values of 4 x 4 pixels; with all 48 a model of this width never learned to draw
SCALE = 1.5  # one for all latents: a video says the same thing in many places, so it bears more noise than a picture
GATE = 0.5  # of attention and feed-forward; diffusers draws it around 0, where blocks hardly learn
SHARPNESS = 1.4  # of queries and keys in self-attention
SHIFT = 5.0  # noise levels are moved upwards, as for Wan: shape and direction are settled where it is noisy


@dataclass(frozen=True)
class WanConfig(TrainConfig):
    steps: int = 4700
    batch: int = 36  # frames, of as many clips as that makes
    muon_rate: float = 6e-3
    still_steps: int = 1700  # of single frames
    late_steps: int = 350  # of these, of the last frame
    sparse_steps: int = 1500  # of three frames of a clip
    hidden: int = 96
    heads: int = 2
    blocks: int = 12


class TinyWan:
    name = "tiny-wan"
    captions = CAPTIONS

    def __init__(self, config: WanConfig):
        self.config = config
        torch.manual_seed(config.seed)
        self.model = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=config.heads,
            attention_head_dim=config.hidden // config.heads,
            in_channels=LATENTS,
            out_channels=LATENTS,
            text_dim=WIDTH,
            freq_dim=64,
            ffn_dim=4 * config.hidden,
            num_layers=config.blocks,
            cross_attn_norm=True,
            rope_max_seq_len=64,
        )
        for name, parameter in self.model.named_parameters():
            if "time_proj" in name or name.startswith("proj_out."):
                nn.init.zeros_(parameter)
            elif name.endswith("scale_shift_table") and "blocks." in name:  # shift, scale and gate, twice
                nn.init.zeros_(parameter)
                with torch.no_grad():
                    parameter[:, [2, 5]] = GATE
            elif name.endswith(("attn1.norm_q.weight", "attn1.norm_k.weight")):
                nn.init.constant_(parameter, SHARPNESS)
        self.basis, self.mean = principal_patches()
        with torch.no_grad():
            embeds, _ = self.pipeline(self.model).encode_prompt(
                [*CAPTIONS, ""], do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
            )
        self.embeds = embeds

    def loss(self, step: int) -> Tensor:
        config, rng = self.config, step_generator(self.config.seed, step)
        frames = 1 if step < config.still_steps else 3 if step < config.still_steps + config.sparse_steps else FRAMES
        batch = config.batch // frames
        at = self.chosen_frames(step, frames, batch, rng)
        clips = draw_clips(batch, frames, rng, at)
        caption = without_some(clips.caption, config.empty_caption, len(CAPTIONS), rng)
        uniform = torch.rand(batch, generator=rng)
        shifted = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        sigma = torch.where(torch.rand(batch, generator=rng) < 0.3, torch.rand(batch, generator=rng), shifted)
        clean = encode(clips.videos, self.basis, self.mean)
        noise = torch.randn(clean.shape, generator=rng)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
        with (
            frames_at(self.model, at if at.ndim == 1 else at[0, 0]),  # a frame alone: any time will do
            torch.autocast("cpu", torch.bfloat16, enabled=config.bf16),
        ):
            velocity = self.model(noisy, sigma * 1000, self.embeds[caption], return_dict=False)[0]
        return (velocity.float() - (noise - clean)).square().mean()

    def chosen_frames(self, step: int, frames: int, batch: int, rng: torch.Generator) -> Tensor:
        """Which frames of its clips a step learns from: [frames], or of single ones one for each clip [batch, 1, 1]."""
        if frames == 1:
            early = torch.rand(batch, 1, 1, generator=rng) < (0.4 if step >= self.config.late_steps else 0.0)
            return torch.where(early, torch.randint(6, (batch, 1, 1), generator=rng), FRAMES - 1)
        return _far_apart(rng) if frames == 3 else torch.arange(FRAMES)

    def pipeline(self, model: nn.Module) -> WanPipeline:
        seeded()
        tokenizer = build_tokenizer(CAPTIONS, TEXT_LENGTH)
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=build_t5(len(tokenizer), multilingual=True),
            vae=linear_video_autoencoder(self.basis, self.mean, SCALE),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            transformer=model,
        )

    def samples(self, pipe: WanPipeline, path: Path, steps: int, rows: int | None = None) -> None:
        """One clip a row, every second frame."""
        videos = pipe(
            prompt=sample_captions(rows or 10),
            negative_prompt="",
            guidance_scale=3.0,
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES - 1,  # without compression in time the pipeline makes one frame more than asked for
            num_inference_steps=steps,
            max_sequence_length=TEXT_LENGTH,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).frames
        save_picture(np.concatenate([np.concatenate(list(video[::2]), axis=1) for video in videos]), path)


def _far_apart(rng: torch.Generator) -> Tensor:
    """Three frames of 13: an early one, one behind the middle, and one of the last two -> [3]."""
    early, late, last = (int(torch.randint(count, (), generator=rng)) for count in (5, 4, 2))
    return torch.tensor([early, FRAMES - 7 + late, FRAMES - 1 - last])


@contextmanager
def frames_at(model: WanTransformer3DModel, at: Tensor) -> Iterator[None]:
    """Inside, frame i of a clip has the rotary position at[i] in time, not i; space is untouched."""
    rope = model.rope
    tables = [cast(Tensor, rope.freqs_cos), cast(Tensor, rope.freqs_sin)]
    rows = slice(len(at)), slice(rope.t_dim)
    earlier = [table[rows].clone() for table in tables]
    for table in tables:
        table[rows] = table[at, : rope.t_dim]
    try:
        yield
    finally:
        for table, before in zip(tables, earlier):
            table[rows] = before


def principal_patches() -> tuple[Tensor, Tensor]:
    """-> the first principal components of 4 x 4 pixels [20, 48], and their mean [48]; the same for every seed."""
    clips = draw_clips(2000, 1, step_generator(0, 0))
    patches = patchify(clips.videos, PATCH).movedim(1, -1).flatten(0, -2).double()
    mean = patches.mean(0)
    _, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean))
    return vectors.T.flip(0)[:LATENTS].float(), mean.float()


def encode(videos: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
    """Pixels [B, 3, F, H, W] to scaled latents [B, 20, F, H/4, W/4], as the autoencoder does, and sooner."""
    patches = patchify(videos, PATCH).movedim(1, -1)
    return ((patches - mean) @ basis.T / SCALE).movedim(-1, 1)


if __name__ == "__main__":
    main(__doc__ or "", WanConfig(), TinyWan, Path(__file__).parent)
