"""Train `tiny-sd3`: a really trained, small text-to-image `StableDiffusion3Pipeline` (Esser et al., 2403.03206).

    python pipelines/tiny-sd3/train.py --bf16 --compile --work runs/tiny-sd3 --out pipelines/tiny-sd3

Joint attention of text and image, flow matching, both guidance branches in one batch; the same data and captions as
`tiny-flux` (`training/fashion.py`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.autoencoders import identity_autoencoder
from training.fashion import (
    CAPTIONS,
    COLOURS,
    NOUNS,
    SIZE,
    TEXT_LENGTH,
    Photos,
    mixed_noise_level,
    sample_captions,
    step_generator,
    without_some,
)
from training.pictures import grid, save_picture
from training.text import WIDTH, build_clip, build_t5, build_tokenizer, seeded
from training.trainer import TrainConfig, main


@dataclass(frozen=True)
class SD3Config(TrainConfig):
    steps: int = 1200
    batch: int = 32
    hidden: int = 80
    heads: int = 2
    blocks: int = 12


class TinySD3:
    name = "tiny-sd3"
    captions = CAPTIONS

    def __init__(self, config: SD3Config):
        self.config, self.photos = config, Photos()
        torch.manual_seed(config.seed)
        self.model = SD3Transformer2DModel(
            sample_size=SIZE,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=config.blocks,
            attention_head_dim=config.hidden // config.heads,
            num_attention_heads=config.heads,
            joint_attention_dim=WIDTH,
            caption_projection_dim=config.hidden,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=SIZE // 2,
            qk_norm="rms_norm",
        )
        for name, parameter in self.model.named_parameters():
            if (".linear." in name and "norm" in name) or name.startswith(("proj_out.", "norm_out.")):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline(self.model).encode_prompt(
                [*CAPTIONS, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
            )
        self.embeds, self.pooled = embeds, pooled

    def loss(self, step: int) -> Tensor:
        config, rng = self.config, step_generator(self.config.seed, step)
        batch = self.photos.draw(config.batch, rng)
        caption = without_some(batch.caption, config.empty_caption, len(CAPTIONS), rng)
        sigma = mixed_noise_level(config.batch, rng)
        noisy = torch.lerp(batch.pictures, batch.noise, sigma[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            velocity = self.model(noisy, self.embeds[caption], self.pooled[caption], sigma * 1000, return_dict=False)[0]
        return (velocity.float() - (batch.noise - batch.pictures)).square().mean()

    def pipeline(self, model: nn.Module) -> StableDiffusion3Pipeline:
        seeded()
        tokenizer = build_tokenizer(CAPTIONS, TEXT_LENGTH)
        one, two = (build_clip(len(tokenizer), TEXT_LENGTH, WIDTH // 2, projection=True) for _ in range(2))
        return StableDiffusion3Pipeline(
            transformer=model,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=identity_autoencoder(),
            text_encoder=one,
            tokenizer=tokenizer,
            text_encoder_2=two,
            tokenizer_2=tokenizer,
            text_encoder_3=build_t5(len(tokenizer)),
            tokenizer_3=tokenizer,
        )

    def samples(self, pipe: StableDiffusion3Pipeline, path: Path, steps: int, rows: int | None = None) -> None:
        images = pipe(
            prompt=sample_captions(rows or len(COLOURS)),
            guidance_scale=3.0,
            num_inference_steps=steps,
            max_sequence_length=TEXT_LENGTH,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        save_picture(grid(images, len(NOUNS)), path)


if __name__ == "__main__":
    main(__doc__ or "", SD3Config(), TinySD3, Path(__file__).parent)
