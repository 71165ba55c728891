"""Small random parts (autoencoders, schedulers, text states, images) from which `tiny_pipelines` assembles pipelines.

Everything here is built from configurations, offline, and draws its numbers from the global torch generator: seed that
one first (`tiny_pipelines.build` does).  Nothing is trained, so the pictures mean nothing; what counts is that a
denoiser's output depends on every one of its blocks, which `enliven` sees to.
"""

from __future__ import annotations

import diffusers
import PIL.Image
import torch

HEADS = 2
HEAD_DIM = 16
HIDDEN = HEADS * HEAD_DIM
TEXT_DIM = 16
TEXT_TOKENS = 8
LATENT_CHANNELS = 4
HEIGHT, WIDTH = 8, 16  # latent rows and columns; two different numbers, so that a mix-up of the two shows

# Settings for models that predict the noise.  An untrained one predicts nothing useful, and with the usual betas the
# result would be blown up more than a hundredfold; clipping, in turn, would leave little but the two bounds.
MILD_NOISE = {"beta_start": 1e-4, "beta_end": 4e-3}
MILD_NOISE_UNCLIPPED = {**MILD_NOISE, "clip_sample": False}


def split_blocks(blocks: int, names: tuple[str, str] = ("num_layers", "num_single_layers")) -> dict[str, int]:
    """Numbers of double-stream and single-stream blocks that add up to `blocks`, under the models' names for them."""
    if blocks < 2:
        raise ValueError(f"a model with two kinds of blocks needs at least 2 of them, not {blocks}")
    double = 2 if blocks > 3 else 1
    return dict(zip(names, (double, blocks - double), strict=True))


def text_states(channels: int = TEXT_DIM, tokens: int = TEXT_TOKENS) -> torch.Tensor:
    """Made-up outputs of a text encoder, one prompt long."""
    return torch.randn(1, tokens, channels)


def text_mask(tokens: int = TEXT_TOKENS, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """An attention mask that keeps every text token."""
    return torch.ones(1, tokens, dtype=dtype)


def guided(mask: str | None = None, tokens: int = TEXT_TOKENS, **more: object) -> dict:
    """Prompt and negative prompt as embeddings and, where `mask` names their argument, the masks of both."""
    arguments: dict = {
        "prompt_embeds": text_states(tokens=tokens),
        "negative_prompt_embeds": text_states(tokens=tokens),
    }
    if mask is not None:
        arguments[mask] = text_mask(tokens)
        arguments[f"negative_{mask}"] = text_mask(tokens)
    return {**arguments, **more}


def image_tensor(height: int, width: int) -> torch.Tensor:
    """A random picture as the pipelines take it: batch, channels, rows, columns, values from 0 to 1."""
    return torch.rand(1, 3, height, width)


def image_picture(height: int, width: int) -> PIL.Image.Image:
    """A random picture for those pipelines that do not take a tensor."""
    return PIL.Image.fromarray((image_tensor(height, width)[0] * 255).byte().permute(1, 2, 0).numpy())


def flow_scheduler(**options: object) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """Euler steps for flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def flow_unipc(shift: float) -> diffusers.UniPCMultistepScheduler:
    """The multistep scheduler that the Wan family ships with."""
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def image_vae(levels: int = 1, **options: object) -> diffusers.AutoencoderKL:
    """An image autoencoder; each level after the first halves the size, so one level keeps it."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * levels,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **options,
    )


def flow_vae(levels: int = 1) -> diffusers.AutoencoderKL:
    """`image_vae` with a shift and a scale as flow-matching image models have them."""
    return image_vae(levels, shift_factor=0.1, scaling_factor=0.4)


def wan_vae() -> diffusers.AutoencoderKLWan:
    """A video autoencoder of the Wan family, 8 times smaller in space and 4 times in time."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1] * LATENT_CHANNELS,
        latents_std=[1.5] * LATENT_CHANNELS,
    )


def qwen_vae() -> diffusers.AutoencoderKLQwenImage:
    """The Qwen-Image autoencoder, 8 times smaller in space."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1] * LATENT_CHANNELS,
        latents_std=[1.5] * LATENT_CHANNELS,
    )


def deep_compression_vae() -> diffusers.AutoencoderDC:
    """The Sana autoencoder, 8 times smaller in space."""
    return diffusers.AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=4,
        encoder_block_out_channels=(4, 8, 8, 8),
        decoder_block_out_channels=(4, 8, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
    )


def cogvideox_vae() -> diffusers.AutoencoderKLCogVideoX:
    """The CogVideoX autoencoder, 4 times smaller in space and in time."""
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
    )


def ltx_vae() -> diffusers.AutoencoderKLLTXVideo:
    """The LTX autoencoder, 8 times smaller in space and in time."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        patch_size=1,
    )


def flux2_vae() -> diffusers.AutoencoderKLFlux2:
    """The FLUX.2 autoencoder, which keeps the size."""
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
    )


def hunyuan_image_vae() -> diffusers.AutoencoderKLHunyuanImage:
    """The HunyuanImage autoencoder, 8 times smaller in space."""
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
        scaling_factor=0.75,
    )


def hunyuan_video_vae() -> diffusers.AutoencoderKLHunyuanVideo:
    """The HunyuanVideo autoencoder, 8 times smaller in space and 4 times in time."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )


def hunyuan_video15_vae() -> diffusers.AutoencoderKLHunyuanVideo15:
    """The HunyuanVideo 1.5 autoencoder, 16 times smaller in space and 4 times in time."""
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS, block_out_channels=(32, 32, 32, 32, 32), layers_per_block=1
    )


def allegro_vae() -> diffusers.AutoencoderKLAllegro:
    """The Allegro autoencoder, 8 times smaller in space and 4 times in time."""
    return diffusers.AutoencoderKLAllegro(
        latent_channels=LATENT_CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )


def cosmos_vae() -> diffusers.AutoencoderKLCosmos:
    """The Cosmos autoencoder, 8 times smaller in space and in time."""
    return diffusers.AutoencoderKLCosmos(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(4, 4, 4, 4),
        decode_block_out_channels=(4, 4, 4, 4),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
    )


def magvit_vae() -> diffusers.AutoencoderKLMagvit:
    """The EasyAnimate autoencoder, 8 times smaller in space and 4 times in time."""
    return diffusers.AutoencoderKLMagvit(
        latent_channels=LATENT_CHANNELS, block_out_channels=[4, 4, 4, 4], layers_per_block=1, norm_num_groups=2
    )


def mochi_vae(channels: int) -> diffusers.AutoencoderKLMochi:
    """The Mochi autoencoder, 8 times smaller in space and 6 times in time."""
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        latent_channels=channels,
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=[0.1] * channels,
        latents_std=[1.5] * channels,
    )


def enliven(denoiser: torch.nn.Module, deviation: float = 0.1, time_gain: float = 4.0) -> None:
    """Make the output of a fresh denoiser depend on each of its blocks, on the prompt and on the timestep.

    Fresh diffusion transformers start with gates and output layers at zero, which hides every block from the result:
    each parameter whose entries are all alike gets some noise.  A few leave a padding token as the memory happened to
    be: it is written first.  And the embedded timestep, which sets the gates, is far weaker than in trained models.
    """
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if name.endswith("pad_token"):
                parameter.zero_()
            if parameter.numel() and parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter), alpha=deviation)
            if "time" in name and name.endswith("linear_2.weight"):
                parameter.mul_(time_gain)
