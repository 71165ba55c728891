"""Train `tiny-flux`: a really trained, small text-to-image `FluxPipeline` (flow matching, Liu et al. 2209.03003).

    python pipelines/tiny-flux/train.py --bf16 --compile --work runs/tiny-flux --out pipelines/tiny-flux

Joint attention of text and image in double and single blocks, guidance branches one after the other; Fashion-MNIST
tinted by its caption (`training/fashion.py`), frozen random CLIP and T5 text encoders, a pixel-space autoencoder.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
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
class FluxConfig(TrainConfig):
    """Steps cost 1.1 s each on two cores with bf16 and compiled blocks."""

    steps: int = 3000
    batch: int = 32
    hidden: int = 96
    heads: int = 3
    double_blocks: int = 4
    single_blocks: int = 10


class TinyFlux:
    """The model, its loss and its pipeline."""

    name = "tiny-flux"
    captions = CAPTIONS

    def __init__(self, config: FluxConfig):
        self.config, self.photos = config, Photos()
        torch.manual_seed(config.seed)
        width = config.hidden // config.heads
        self.model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=12,
            num_layers=config.double_blocks,
            num_single_layers=config.single_blocks,
            attention_head_dim=width,
            num_attention_heads=config.heads,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(width - 2 * (width // 8 * 3), width // 8 * 3, width // 8 * 3),
        )
        for name, parameter in self.model.named_parameters():
            if (".linear." in name and "norm" in name) or name.startswith(("proj_out.", "norm_out.")):
                nn.init.zeros_(parameter)
        pipe = self.pipeline(self.model)
        with torch.no_grad():
            embeds, pooled, self.text_ids = pipe.encode_prompt([*CAPTIONS, ""], None, max_sequence_length=TEXT_LENGTH)
        self.embeds, self.pooled, self.pack = embeds, pooled, pipe._pack_latents
        self.image_ids = pipe._prepare_latent_image_ids(1, SIZE // 2, SIZE // 2, torch.device("cpu"), torch.float32)

    def loss(self, step: int) -> Tensor:
        config, rng = self.config, step_generator(self.config.seed, step)
        batch = self.photos.draw(config.batch, rng)
        caption = without_some(batch.caption, config.empty_caption, len(CAPTIONS), rng)
        sigma = mixed_noise_level(config.batch, rng)
        noisy = torch.lerp(batch.pictures, batch.noise, sigma[:, None, None, None])
        packed, target = (
            self.pack(pixels, config.batch, 3, SIZE, SIZE) for pixels in (noisy, batch.noise - batch.pictures)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            velocity = self.model(
                hidden_states=packed,
                timestep=sigma,
                encoder_hidden_states=self.embeds[caption],
                pooled_projections=self.pooled[caption],
                txt_ids=self.text_ids,
                img_ids=self.image_ids,
                return_dict=False,
            )[0]
        return (velocity.float() - target).square().mean()

    def pipeline(self, model: nn.Module) -> FluxPipeline:
        tokenizer = build_tokenizer(CAPTIONS, TEXT_LENGTH)
        seeded()
        clip, t5 = build_clip(len(tokenizer), TEXT_LENGTH), build_t5(len(tokenizer))
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=identity_autoencoder(),
            text_encoder=clip,
            tokenizer=tokenizer,
            text_encoder_2=t5,
            tokenizer_2=tokenizer,
            transformer=model,
        )

    def samples(self, pipe: FluxPipeline, path: Path, steps: int, rows: int | None = None) -> None:
        images = pipe(
            prompt=(prompts := sample_captions(rows or len(COLOURS))),
            negative_prompt=[""] * len(prompts),
            true_cfg_scale=3.0,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            max_sequence_length=TEXT_LENGTH,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        save_picture(grid(images, len(NOUNS)), path)


if __name__ == "__main__":
    main(__doc__ or "", FluxConfig(), TinyFlux, Path(__file__).parent)
