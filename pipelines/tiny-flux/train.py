"""Train `tiny-flux`: a really trained, small text-to-image `FluxPipeline` (flow matching, Liu et al. 2209.03003).

    python pipelines/tiny-flux/train.py --out pipelines/tiny-flux --work runs/tiny-flux

Data: Fashion-MNIST (Debian package `dataset-fashion-mnist`, MIT licence, 60,000 photos), padded to 32 x 32 and tinted
by its caption, "a red t-shirt on a white background": 10 nouns x 8 colours x 3 backgrounds, 10 % empty captions.
Frozen parts: random CLIP and T5 text encoders behind a word-level tokenizer, and an `AutoencoderTiny` whose weights are
set by hand to the identity, so this is a pixel-space model.
Seeded (each step draws from its own generator, so a resumed run sees the same batches), resumable (safetensors + JSON).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

NOUNS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.95, 0.90, 0.10),
    "green": (0.10, 0.70, 0.20),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.15, 0.25, 0.95),
    "purple": (0.55, 0.15, 0.75),
    "pink": (1.00, 0.50, 0.75),
}
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "gray": (0.5, 0.5, 0.5), "black": (0.0, 0.0, 0.0)}
CAPTIONS = tuple(f"a {c} {n} on a {b} background" for n in NOUNS for c in COLOURS for b in BACKGROUNDS)

SIZE = 32  # pixels a side
TEXT_LENGTH = 10  # tokens: 8 words at most, begin and end
DATASET = Path("/usr/share/datasets/fashion-mnist")
LATENT_UNIT = 2.0**-10  # the autoencoder's latents are tiny, so that the decoder's tanh clamp is linear to 3e-7


@dataclass(frozen=True)
class TrainConfig:
    """What decides the weights. `steps` may be changed when resuming, as long as the decay has not begun."""

    seed: int = 0
    steps: int = 5000
    batch: int = 32
    bf16: bool = False
    hidden: int = 96
    heads: int = 3
    double_blocks: int = 4
    single_blocks: int = 10
    muon_rate: float = 3e-3
    adam_rate: float = 2e-3
    warmup: int = 50
    decay_fraction: float = 0.35
    ema_half_life: int = 150
    empty_caption: float = 0.1


# ---------------------------------------------------------------------------------------------- frozen components


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the 24 words that captions can contain; unknown words become <unk>."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^a-z\-]+"), "removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def build_text_encoders(vocabulary: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Frozen random encoders of width 64. `initializer_factor` 20 spreads CLIP's pooled outputs far enough apart."""
    torch.manual_seed(0)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=64,
            initializer_factor=20.0,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,  # 2 would select CLIP's legacy pooling at the largest token id
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=64,
            d_kv=32,
            d_ff=128,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=3,
        )
    )
    return clip.eval(), t5.eval()


@torch.no_grad()
def build_identity_autoencoder() -> AutoencoderTiny:
    """`AutoencoderTiny` that is the identity: centre taps only; x = relu(x) - relu(-x) passes the decoder's ReLU."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(6,),
        decoder_block_out_channels=(6,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        latent_channels=3,
        act_fn="relu",
        scaling_factor=1.0 / LATENT_UNIT,
        shift_factor=0.0,
    )
    for parameter in vae.parameters():
        parameter.zero_()
    encoder = [m for m in vae.encoder.modules() if isinstance(m, nn.Conv2d)]
    decoder = [m for m in vae.decoder.modules() if isinstance(m, nn.Conv2d)]
    for c in range(3):
        encoder[0].weight[c, c, 1, 1] = 1.0  # the encoder maps [-1, 1] to [0, 1] before its first layer
        encoder[1].weight[c, c, 1, 1] = 2.0 * LATENT_UNIT
        encoder[1].bias[c] = -LATENT_UNIT
        decoder[0].weight[c, c, 1, 1] = 1.0
        decoder[0].weight[c + 3, c, 1, 1] = -1.0
        decoder[1].weight[c, c, 1, 1] = 0.5 / LATENT_UNIT
        decoder[1].weight[c, c + 3, 1, 1] = -0.5 / LATENT_UNIT
        decoder[1].bias[c] = 0.5  # the decoder maps [0, 1] back to [-1, 1] after its last layer
    return vae.eval()


def build_transformer(config: TrainConfig) -> FluxTransformer2DModel:
    """The denoiser, adaLN-zero initialised: modulation, `norm_out` and `proj_out` start at zero."""
    torch.manual_seed(config.seed)
    width = config.hidden // config.heads
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=12,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=width,
        num_attention_heads=config.heads,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(width - 2 * (width // 8 * 3), width // 8 * 3, width // 8 * 3),
    )
    for name, parameter in transformer.named_parameters():
        if (".linear." in name and "norm" in name) or name.startswith(("proj_out.", "norm_out.")):
            nn.init.zeros_(parameter)
    return transformer


def build_pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    tokenizer = build_tokenizer()
    clip, t5 = build_text_encoders(len(tokenizer))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=build_identity_autoencoder(),
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


# ----------------------------------------------------------------------------------------------------------- data


def read_idx(path: Path) -> np.ndarray:
    """Read one gzip-compressed IDX file of unsigned bytes."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: install the data with `apt-get install dataset-fashion-mnist`")
    with gzip.open(path, "rb") as file:
        raw = file.read()
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def load_photos(split: str = "train") -> tuple[Tensor, Tensor]:
    """Photos [N, 32, 32] as uint8 (28 x 28 padded by two) and labels [N]."""
    photos = torch.from_numpy(read_idx(DATASET / f"{split}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(DATASET / f"{split}-labels-idx1-ubyte.gz").copy())
    return nn.functional.pad(photos, (2, 2, 2, 2)), labels.long()


def tint(gray: Tensor, colour: Tensor, background: Tensor) -> Tensor:
    """Tint gray photos [B, 32, 32] in [0, 1] by colour [B, 3] over background [B, 3] -> [B, 3, 32, 32] in [-1, 1]."""
    coverage = (gray / 0.15).clamp(0, 1)[:, None]
    shade = (0.25 + 0.75 * gray)[:, None]
    picture = coverage * shade * colour[:, :, None, None] + (1 - coverage) * background[:, :, None, None]
    return picture * 2 - 1


class Batches:
    """Draws batches; step `i` of seed `s` is always the same batch, however often the run was resumed."""

    def __init__(self, config: TrainConfig, pipe: FluxPipeline):
        self.config = config
        self.photos, self.labels = load_photos()
        self.colours = torch.tensor(list(COLOURS.values()))
        self.backgrounds = torch.tensor(list(BACKGROUNDS.values()))
        with torch.no_grad():
            embeds, pooled, self.text_ids = pipe.encode_prompt([*CAPTIONS, ""], None, max_sequence_length=TEXT_LENGTH)
        self.embeds, self.pooled = embeds, pooled

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> pictures [B, 3, 32, 32], noise of that shape, sigma [B], caption index [B]."""
        config, rng = self.config, torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        batch = config.batch
        index = torch.randint(len(self.photos), (batch,), generator=rng)
        colour = torch.randint(len(COLOURS), (batch,), generator=rng)
        ground = torch.randint(len(BACKGROUNDS), (batch,), generator=rng)
        pictures = tint(self.photos[index] / 255.0, self.colours[colour], self.backgrounds[ground])
        caption = (self.labels[index] * len(COLOURS) + colour) * len(BACKGROUNDS) + ground
        empty = torch.rand(batch, generator=rng) < config.empty_caption
        caption = torch.where(empty, len(CAPTIONS), caption)
        normal = torch.sigmoid(torch.randn(batch, generator=rng) + 0.3)
        uniform = torch.rand(batch, generator=rng)
        sigma = torch.where(torch.rand(batch, generator=rng) < 0.3, uniform, normal)
        return pictures, torch.randn(pictures.shape, generator=rng), sigma, caption


# ------------------------------------------------------------------------------------------------------ optimiser


class Muon:
    """Muon (Jordan et al. 2024; update scale of Moonlight, 2502.16982) in fp32, same-shape matrices batched.

    torch.optim.Muon orthogonalises in bf16, one matrix at a time: twice the cost of this model's forward and backward
    on a CPU.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], momentum: float = 0.95):
        self.parameters, self.momentum = parameters, momentum
        self.state = {name: torch.zeros_like(p) for name, p in parameters.items()}
        shapes = sorted({tuple(p.shape) for p in parameters.values()})
        self.groups = [[n for n, p in parameters.items() if tuple(p.shape) == shape] for shape in shapes]

    @staticmethod
    def orthogonalise(g: Tensor) -> Tensor:
        """Quintic Newton-Schulz iteration: singular values of [N, R, C] to about one."""
        transposed = g.shape[-2] > g.shape[-1]
        x = g.mT if transposed else g
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.mT if transposed else x

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for names in self.groups:
            gradient = torch.stack([self.parameters[n].grad for n in names])
            buffer = torch.stack([self.state[n] for n in names]).lerp_(gradient, 1 - self.momentum)
            update = self.orthogonalise(gradient.lerp(buffer, self.momentum))
            scale = 0.2 * math.sqrt(max(update.shape[-2:]))
            for name, one, moment in zip(names, update, buffer):
                self.state[name].copy_(moment)
                self.parameters[name].mul_(1 - rate * 0.01).add_(one, alpha=-rate * scale)


def rate_factor(step: int, config: TrainConfig) -> float:
    """Warm-up, plateau, linear decay to zero over the last `decay_fraction` of the steps."""
    decay = (config.steps - step) / (config.decay_fraction * config.steps)
    return max(0.0, min(1.0, (step + 1) / config.warmup, decay))


# -------------------------------------------------------------------------------------------------------- training


def save_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(tensors, str(temporary))
    os.replace(temporary, path)


class Trainer:
    def __init__(self, config: TrainConfig, work: Path):
        self.config, self.work = config, work
        self.transformer = build_transformer(config)
        self.pipe = build_pipeline(self.transformer)
        self.batches = Batches(config, self.pipe)
        named = dict(self.transformer.named_parameters())
        matrices = {n: p for n, p in named.items() if "transformer_blocks" in n and p.ndim == 2}
        self.muon = Muon(matrices)
        self.rest = [p for n, p in named.items() if n not in matrices]
        self.adam = torch.optim.AdamW(self.rest, lr=config.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.ema = {n: p.detach().clone() for n, p in named.items()}
        self.named, self.step, self.seconds = named, 0, 0.0
        self.img_ids = self.pipe._prepare_latent_image_ids(1, SIZE // 2, SIZE // 2, torch.device("cpu"), torch.float32)

    def loss(self, step: int) -> Tensor:
        pictures, noise, sigma, caption = self.batches.draw(step)
        noisy = torch.lerp(pictures, noise, sigma[:, None, None, None])
        packed = self.pipe._pack_latents(noisy, len(noisy), 3, SIZE, SIZE)
        target = self.pipe._pack_latents(noise - pictures, len(noisy), 3, SIZE, SIZE)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            velocity = self.forward(packed, sigma, self.batches.embeds[caption], self.batches.pooled[caption])
        return (velocity.float() - target).square().mean()

    def forward(self, packed: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        """Velocity [B, 256, 12] of packed latents [B, 256, 12] at noise level sigma [B]."""
        return self.transformer(
            hidden_states=packed,
            timestep=sigma,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            txt_ids=self.batches.text_ids,
            img_ids=self.img_ids,
            return_dict=False,
        )[0]

    def train_step(self) -> float:
        config = self.config
        loss = self.loss(self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        factor = rate_factor(self.step, config)
        self.muon.step(config.muon_rate * factor)
        self.adam.param_groups[0]["lr"] = config.adam_rate * factor
        self.adam.step()
        for parameter in self.named.values():
            parameter.grad = None
        # A half-life that grows with the run: early averages must not remember the random start.
        keep = 0.5 ** (1 / min(config.ema_half_life, 1 + self.step / 10))
        with torch.no_grad():
            for name, average in self.ema.items():
                average.lerp_(self.named[name], 1 - keep)
        self.step += 1
        return loss.item()

    def save(self) -> None:
        tensors = {f"model.{n}": p.detach() for n, p in self.named.items()}
        tensors |= {f"ema.{n}": t for n, t in self.ema.items()}
        tensors |= {f"muon.{n}": t for n, t in self.muon.state.items()}
        for i, parameter in enumerate(self.rest):
            state = self.adam.state[parameter]
            tensors |= {f"adam.{i}.{key}": state[key].reshape(-1) for key in ("step", "exp_avg", "exp_avg_sq")}
        tensors["progress"] = torch.tensor([self.step, self.seconds], dtype=torch.float64)
        self.work.mkdir(parents=True, exist_ok=True)
        save_atomically(tensors, self.work / "checkpoint.safetensors")
        (self.work / "config.json").write_text(json.dumps(asdict(self.config), indent=2))

    @torch.no_grad()
    def resume(self) -> None:
        path = self.work / "checkpoint.safetensors"
        if not path.exists():
            return
        earlier = TrainConfig(**json.loads((self.work / "config.json").read_text()))
        if replace(earlier, steps=self.config.steps) != self.config:
            raise SystemExit(f"{path} was made with {earlier}; use the same settings, or another --work folder")
        tensors = load_file(str(path))
        for name, parameter in self.named.items():
            parameter.copy_(tensors[f"model.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
        for name, moment in self.muon.state.items():
            moment.copy_(tensors[f"muon.{name}"])
        for i, parameter in enumerate(self.rest):
            self.adam.state[parameter] = {
                "step": tensors[f"adam.{i}.step"].reshape(()),
                "exp_avg": tensors[f"adam.{i}.exp_avg"].reshape(parameter.shape).clone(),
                "exp_avg_sq": tensors[f"adam.{i}.exp_avg_sq"].reshape(parameter.shape).clone(),
            }
        self.step, self.seconds = int(tensors["progress"][0]), float(tensors["progress"][1])
        print(f"resumed at step {self.step}", flush=True)

    def averaged_pipeline(self) -> FluxPipeline:
        """A pipeline of its own that holds the averaged weights."""
        transformer = FluxTransformer2DModel.from_config(self.transformer.config)
        transformer.load_state_dict(self.ema, strict=False)
        pipe = build_pipeline(transformer.eval())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, save_every: int, sample_every: int) -> None:
        self.resume()
        recent, started = 0.0, time.monotonic()
        with tqdm(total=self.config.steps, initial=self.step, mininterval=5, desc="tiny-flux") as bar:
            while self.step < self.config.steps:
                loss = self.train_step()
                recent = loss if not recent else 0.98 * recent + 0.02 * loss
                bar.update()
                if self.step % 50 == 0:
                    with (self.work / "loss.csv").open("a") as file:
                        file.write(f"{self.step},{recent:.5f}\n")
                    bar.set_postfix(loss=f"{recent:.4f}")
                if self.step % save_every == 0 or self.step == self.config.steps:
                    self.seconds += time.monotonic() - started
                    started = time.monotonic()
                    self.save()
                if self.step % sample_every == 0:
                    sample_grid(self.averaged_pipeline(), self.work / f"samples-{self.step:06d}.png", rows=3)


# --------------------------------------------------------------------------------------------------------- results


def sample_grid(pipe: FluxPipeline, path: Path, rows: int = 8, steps: int = 28, guidance: float = 3.0) -> None:
    """A grid of one column a noun and one row a colour, backgrounds in turn, written as PNG (two pixels a pixel)."""
    strip = []
    for row, colour in enumerate(list(COLOURS)[:rows]):
        grounds = list(BACKGROUNDS)
        prompts = [f"a {colour} {noun} on a {grounds[(row + i) % 3]} background" for i, noun in enumerate(NOUNS)]
        images = pipe(
            prompt=prompts,
            negative_prompt=[""] * len(prompts),
            true_cfg_scale=guidance,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            max_sequence_length=TEXT_LENGTH,
            generator=torch.Generator().manual_seed(row),
            output_type="np",
        ).images
        strip.append(np.concatenate(list(images), axis=1))
    grid = (np.concatenate(strip, axis=0) * 255).round().astype(np.uint8)
    picture = Image.fromarray(grid)
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


def publish(trainer: Trainer, out: Path) -> None:
    """Write the averaged weights as a standard diffusers folder, and how they were made beside them."""
    pipe = trainer.averaged_pipeline()
    pipe.save_pretrained(out)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)  # save_pretrained leaves 600, which other users cannot read
    sample_grid(pipe, out / "samples.png", steps=50)
    record = asdict(trainer.config) | {"torch": torch.__version__, "wall_seconds": round(trainer.seconds)}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {out}")


def main() -> None:
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-flux"), help="checkpoints and samples")
    parser.add_argument("--out", type=Path, help="write the finished pipeline here")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument(
        "--bf16", action="store_true", help="forward and backward in bfloat16 (faster with avx512_bf16)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks (needs a C++ compiler)")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--sample-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = replace(defaults, seed=arguments.seed, steps=arguments.steps, batch=arguments.batch, bf16=arguments.bf16)
    arguments.work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, arguments.work)
    if arguments.compile:
        for block in [*trainer.transformer.transformer_blocks, *trainer.transformer.single_transformer_blocks]:
            block.compile()
    trainer.run(arguments.save_every, arguments.sample_every)
    if arguments.out:
        publish(trainer, arguments.out)


if __name__ == "__main__":
    main()
