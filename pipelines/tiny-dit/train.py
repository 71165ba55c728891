"""Train `tiny-dit`: a really trained, small class-conditional `DiTPipeline` (DiT, Peebles and Xie, 2212.09748).

    python pipelines/tiny-dit/train.py --bf16 --compile --work runs/tiny-dit --out pipelines/tiny-dit

Noise prediction on DDPM's linear schedule; sampled with DDIM; a class is a noun, a colour and a background
(`training/fashion.py`), 240 of the 1000 that the pipeline can tell apart; the 1001st is "no class".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.autoencoders import identity_autoencoder
from training.fashion import (
    BACKGROUNDS,
    CAPTIONS,
    COLOURS,
    NOUNS,
    SIZE,
    Photos,
    sample_captions,
    step_generator,
    without_some,
)
from training.pictures import grid, save_picture
from training.trainer import TrainConfig, main

NO_CLASS = 1000  # DiTPipeline's own


@dataclass(frozen=True)
class DiTConfig(TrainConfig):
    steps: int = 1600
    batch: int = 48
    hidden: int = 80
    heads: int = 2
    blocks: int = 12


class TinyDiT:
    name = "tiny-dit"
    captions = tuple(caption.removeprefix("a ") for caption in CAPTIONS)

    def __init__(self, config: DiTConfig):
        self.config, self.photos = config, Photos()
        torch.manual_seed(config.seed)
        self.model = DiTTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.hidden // config.heads,
            in_channels=3,
            out_channels=3,
            num_layers=config.blocks,
            sample_size=SIZE,
            patch_size=2,
            num_embeds_ada_norm=NO_CLASS,
        ).eval()  # in training mode each block drops labels of its own accord, and from torch's global generator
        # The classes are products of noun, colour and background, and start as sums of one vector for each: what is
        # learned for one red thing is then known of all red things.
        parts = [torch.randn(len(names), config.hidden) * 0.5 for names in (NOUNS, COLOURS, BACKGROUNDS)]
        table = (parts[0][:, None, None] + parts[1][None, :, None] + parts[2][None, None]).flatten(0, 2)
        for name, parameter in self.model.named_parameters():
            if ".norm1.linear." in name or name.startswith(("proj_out_1.", "proj_out_2.")):
                nn.init.zeros_(parameter)
            if "embedding_table" in name:
                nn.init.zeros_(parameter)
                with torch.no_grad():
                    parameter[: len(table)] = table
        self.scheduler = DDIMScheduler(
            beta_schedule="linear", clip_sample=False, prediction_type="epsilon", steps_offset=1
        )

    def loss(self, step: int) -> Tensor:
        config, rng = self.config, step_generator(self.config.seed, step)
        batch = self.photos.draw(config.batch, rng)
        label = without_some(batch.caption, config.empty_caption, NO_CLASS, rng)
        time = torch.randint(1000, (config.batch,), generator=rng)
        noisy = self.scheduler.add_noise(batch.pictures, batch.noise, time)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            noise = self.model(noisy, time, class_labels=label, return_dict=False)[0]
        return (noise.float() - batch.noise).square().mean()

    def pipeline(self, model: nn.Module) -> DiTPipeline:
        names = dict(enumerate(self.captions))
        pipe = DiTPipeline(model, identity_autoencoder(), self.scheduler, id2label=names)
        pipe.register_to_config(id2label=names)  # DiTPipeline does not do so itself, and would not save them
        return pipe

    def samples(self, pipe: DiTPipeline, path: Path, steps: int, rows: int | None = None) -> None:
        labels = [CAPTIONS.index(caption) for caption in sample_captions(rows or len(COLOURS))]
        images = pipe(
            labels,
            guidance_scale=3.0,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        save_picture(grid(images, len(NOUNS)), path)


if __name__ == "__main__":
    main(__doc__ or "", DiTConfig(), TinyDiT, Path(__file__).parent)
