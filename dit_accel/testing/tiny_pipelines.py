"""Small diffusers pipelines with random weights, built offline from configurations, for the tests.

`build(name)` assembles one pipeline together with the arguments of a call, `call(tiny)` runs it and returns one tensor,
and `NAMES` lists what there is.  Text encoders and tokenizers are left out: the arguments carry ready-made embeddings.
A size is as small as its pipeline allows, and every block of a denoiser has a say in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import diffusers
import numpy
import torch
import transformers
from diffusers import DiffusionPipeline, ModularPipeline

from dit_accel.testing.tiny_components import (
    HEAD_DIM,
    HEADS,
    HEIGHT,
    HIDDEN,
    LATENT_CHANNELS,
    MILD_NOISE,
    MILD_NOISE_UNCLIPPED,
    TEXT_DIM,
    TEXT_TOKENS,
    WIDTH,
    allegro_vae,
    cogvideox_vae,
    cosmos_vae,
    deep_compression_vae,
    enliven,
    flow_scheduler,
    flow_unipc,
    flow_vae,
    flux2_vae,
    guided,
    hunyuan_image_vae,
    hunyuan_video15_vae,
    hunyuan_video_vae,
    image_picture,
    image_tensor,
    image_vae,
    ltx_vae,
    magvit_vae,
    mochi_vae,
    qwen_vae,
    split_blocks,
    text_mask,
    text_states,
    wan_vae,
)


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline and what a call of it needs besides the number of steps and the generator."""

    name: str
    pipe: DiffusionPipeline | ModularPipeline
    arguments: dict
    denoisers: tuple[str, ...]


class Parts(NamedTuple):
    """What a factory hands to `build`."""

    pipe: DiffusionPipeline | ModularPipeline
    arguments: dict
    denoisers: tuple[str, ...] = ("transformer",)


Factory = Callable[[int], Parts]
_FACTORIES: dict[str, Factory] = {}

PACKED_CHANNELS = 4 * LATENT_CHANNELS  # for models whose tokens are 2 by 2 latent pixels
ROPE_AXES = (4, 6, 6)
IMAGE_SIZE = {"height": HEIGHT, "width": WIDTH}
IMAGE_SIZE_8 = {"height": 8 * HEIGHT, "width": 8 * WIDTH}
NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXT_2 = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
NO_TEXT_3 = {**NO_TEXT_2, "text_encoder_3": None, "tokenizer_3": None}
ATTENTION = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
CROSS_ATTENTION = {
    "num_cross_attention_heads": HEADS,
    "cross_attention_head_dim": HEAD_DIM,
    "cross_attention_dim": HIDDEN,
}
LATENTS = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
STRENGTH = 0.7  # from image to image: of 6 steps the last 4 or 5 are left


def _register(name: str, needs: str = "DiffusionPipeline") -> Callable[[Factory], Factory]:
    """Enter a factory under `name`, where the diffusers that is installed has the class that it needs."""

    def enter(factory: Factory) -> Factory:
        if hasattr(diffusers, needs):
            _FACTORIES[name] = factory
        return factory

    return enter


# --- images: class labels or cross-attention to the text -------------------------------------------------------------


@_register("dit")
def _dit(blocks: int) -> Parts:
    transformer = diffusers.DiTTransformer2DModel(
        **ATTENTION, in_channels=LATENT_CHANNELS, out_channels=2 * LATENT_CHANNELS, num_layers=blocks, sample_size=8
    )
    pipe = diffusers.DiTPipeline(transformer, image_vae(), diffusers.DDIMScheduler(**MILD_NOISE_UNCLIPPED))
    return Parts(pipe, {"class_labels": [1], "output_type": "pt"})


def _pixart(pipeline_class: type, blocks: int) -> Parts:
    transformer = diffusers.PixArtTransformer2DModel(
        **ATTENTION,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=blocks,
        cross_attention_dim=HIDDEN,
        sample_size=8,
        caption_channels=TEXT_DIM,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(**MILD_NOISE)
    pipe = pipeline_class(transformer=transformer, vae=image_vae(), scheduler=scheduler, **NO_TEXT)
    arguments = guided("prompt_attention_mask", **IMAGE_SIZE, negative_prompt=None, use_resolution_binning=False)
    return Parts(pipe, arguments)


@_register("pixart_alpha")
def _pixart_alpha(blocks: int) -> Parts:
    return _pixart(diffusers.PixArtAlphaPipeline, blocks)


@_register("pixart_sigma")
def _pixart_sigma(blocks: int) -> Parts:
    return _pixart(diffusers.PixArtSigmaPipeline, blocks)


@_register("sana")
def _sana(blocks: int) -> Parts:
    transformer = diffusers.SanaTransformer2DModel(
        **ATTENTION, **LATENTS, num_layers=blocks, **CROSS_ATTENTION, caption_channels=TEXT_DIM, sample_size=8
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.SanaPipeline(transformer=transformer, vae=deep_compression_vae(), scheduler=scheduler, **NO_TEXT)
    arguments = guided(
        mask="prompt_attention_mask", height=32, width=64, negative_prompt=None, use_resolution_binning=False
    )
    return Parts(pipe, arguments)


@_register("hunyuan_dit")
def _hunyuan_dit(blocks: int) -> Parts:
    if blocks < 4 or blocks % 2:
        raise ValueError(f"HunyuanDiT links its two halves: it needs an even number of blocks from 4 on, not {blocks}")
    transformer = diffusers.HunyuanDiT2DModel(
        **ATTENTION,
        in_channels=LATENT_CHANNELS,
        patch_size=2,
        sample_size=8,
        hidden_size=HIDDEN,
        num_layers=blocks,
        cross_attention_dim=TEXT_DIM,
        cross_attention_dim_t5=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        text_len=TEXT_TOKENS,
        text_len_t5=TEXT_TOKENS,
    )
    pipe = diffusers.HunyuanDiTPipeline(
        transformer=transformer,
        vae=image_vae(),
        scheduler=diffusers.DDPMScheduler(**MILD_NOISE_UNCLIPPED),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **NO_TEXT_2,
    )
    arguments = guided("prompt_attention_mask", height=16, width=16, use_resolution_binning=False)
    for prefix in ("", "negative_"):
        arguments[f"{prefix}prompt_embeds_2"] = text_states()
        arguments[f"{prefix}prompt_attention_mask_2"] = text_mask()
    return Parts(pipe, arguments)


@_register("lumina")
def _lumina(blocks: int) -> Parts:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        hidden_size=HIDDEN,
        num_layers=blocks,
        num_attention_heads=HEADS,
        num_kv_heads=HEADS,
        multiple_of=16,
        cross_attention_dim=TEXT_DIM,
    )
    vae = image_vae(levels=4)  # the pipeline takes it for granted that latents are 8 times smaller
    pipe = diffusers.LuminaPipeline(transformer=transformer, vae=vae, scheduler=flow_scheduler(), **NO_TEXT)
    return Parts(pipe, guided("prompt_attention_mask", **IMAGE_SIZE_8))


# --- images: text and picture in one attention -----------------------------------------------------------------------


def _sd3_options(blocks: int) -> dict:
    return {
        **ATTENTION,
        "sample_size": 8,
        **LATENTS,
        "num_layers": blocks,
        "joint_attention_dim": TEXT_DIM,
        "caption_projection_dim": HIDDEN,
        "pooled_projection_dim": TEXT_DIM,
        "pos_embed_max_size": 16,
        "qk_norm": "rms_norm",
    }


def _sd3_parts(pipeline_class: type, blocks: int, arguments: dict, **components: object) -> Parts:
    pipe = pipeline_class(
        transformer=diffusers.SD3Transformer2DModel(**_sd3_options(blocks)),
        vae=flow_vae(),
        scheduler=flow_scheduler(shift=3.0),
        **NO_TEXT_3,
        **components,
    )
    pooled = {
        "pooled_prompt_embeds": torch.randn(1, TEXT_DIM),
        "negative_pooled_prompt_embeds": torch.randn(1, TEXT_DIM),
    }
    return Parts(pipe, guided(**pooled, **arguments))


@_register("sd3")
def _sd3(blocks: int) -> Parts:
    return _sd3_parts(diffusers.StableDiffusion3Pipeline, blocks, IMAGE_SIZE)


@_register("sd3_img2img")
def _sd3_img2img(blocks: int) -> Parts:
    arguments = {**IMAGE_SIZE, "image": image_tensor(HEIGHT, WIDTH), "strength": STRENGTH}
    return _sd3_parts(diffusers.StableDiffusion3Img2ImgPipeline, blocks, arguments)


@_register("sd3_controlnet")
def _sd3_controlnet(blocks: int) -> Parts:
    controlnet = diffusers.SD3ControlNetModel(**_sd3_options(max(1, blocks // 2)))
    arguments = {**IMAGE_SIZE, "control_image": image_tensor(HEIGHT, WIDTH)}
    return _sd3_parts(diffusers.StableDiffusion3ControlNetPipeline, blocks, arguments, controlnet=controlnet)


def _flux_options(blocks: int) -> dict:
    return {
        **ATTENTION,
        "in_channels": PACKED_CHANNELS,
        **split_blocks(blocks),
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": TEXT_DIM,
        "guidance_embeds": True,
        "axes_dims_rope": ROPE_AXES,
    }


def _flux_parts(pipeline_class: type, blocks: int, arguments: dict, **components: object) -> Parts:
    pipe = pipeline_class(
        transformer=diffusers.FluxTransformer2DModel(**_flux_options(blocks)),
        vae=flow_vae(),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        **NO_TEXT_2,
        **components,
    )
    prompt = {"prompt_embeds": text_states(), "pooled_prompt_embeds": torch.randn(1, TEXT_DIM)}
    return Parts(pipe, {**prompt, **IMAGE_SIZE, **arguments})


@_register("flux")
def _flux(blocks: int) -> Parts:
    return _flux_parts(diffusers.FluxPipeline, blocks, {})


@_register("flux_true_cfg")
def _flux_true_cfg(blocks: int) -> Parts:
    negative = {"negative_prompt_embeds": text_states(), "negative_pooled_prompt_embeds": torch.randn(1, TEXT_DIM)}
    return _flux_parts(diffusers.FluxPipeline, blocks, {**negative, "true_cfg_scale": 3.0})


@_register("flux_img2img")
def _flux_img2img(blocks: int) -> Parts:
    arguments = {"image": image_tensor(HEIGHT, WIDTH), "strength": STRENGTH}
    return _flux_parts(diffusers.FluxImg2ImgPipeline, blocks, arguments)


@_register("flux_inpaint")
def _flux_inpaint(blocks: int) -> Parts:
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., WIDTH // 2 :] = 1.0
    arguments = {"image": image_tensor(HEIGHT, WIDTH), "mask_image": mask, "strength": STRENGTH}
    return _flux_parts(diffusers.FluxInpaintPipeline, blocks, arguments)


@_register("flux_kontext")
def _flux_kontext(blocks: int) -> Parts:
    arguments = {"image": image_tensor(HEIGHT, WIDTH), "max_area": HEIGHT * WIDTH, "_auto_resize": False}
    return _flux_parts(diffusers.FluxKontextPipeline, blocks, arguments)


@_register("flux_controlnet")
def _flux_controlnet(blocks: int) -> Parts:
    controlnet = diffusers.FluxControlNetModel(**_flux_options(max(2, blocks // 2)))
    arguments = {"control_image": image_tensor(HEIGHT, WIDTH)}
    return _flux_parts(diffusers.FluxControlNetPipeline, blocks, arguments, controlnet=controlnet)


def _hush(block: diffusers.ModularPipelineBlocks) -> None:
    """Switch the progress bars off at every depth; the modular pipeline's own switch stops at the first."""
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for inner in getattr(block, "sub_blocks", {}).values():
        _hush(inner)


@_register("flux_modular")
def _flux_modular(blocks: int) -> Parts:
    text_to_image = diffusers.modular_pipelines.FluxAutoBlocks()
    text_to_image.sub_blocks.pop("text_encoder")
    _hush(text_to_image)
    pipe = text_to_image.init_pipeline()
    pipe.update_components(
        transformer=diffusers.FluxTransformer2DModel(**_flux_options(blocks)),
        vae=flow_vae(),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
    )
    prompt = {"prompt_embeds": text_states(), "pooled_prompt_embeds": torch.randn(1, TEXT_DIM)}
    return Parts(pipe, {**prompt, **IMAGE_SIZE})


@_register("flux2")
def _flux2(blocks: int) -> Parts:
    transformer = diffusers.Flux2Transformer2DModel(
        **ATTENTION,
        in_channels=PACKED_CHANNELS,
        **split_blocks(blocks),
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 4, 4, 4),
    )
    scheduler = flow_scheduler(use_dynamic_shifting=True)
    pipe = diffusers.Flux2Pipeline(transformer=transformer, vae=flux2_vae(), scheduler=scheduler, **NO_TEXT)
    return Parts(pipe, {"prompt_embeds": text_states(), **IMAGE_SIZE})


@_register("chroma")
def _chroma(blocks: int) -> Parts:
    transformer = diffusers.ChromaTransformer2DModel(
        **ATTENTION,
        in_channels=PACKED_CHANNELS,
        **split_blocks(blocks),
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=ROPE_AXES,
        approximator_num_channels=16,
        approximator_hidden_dim=HIDDEN,
        approximator_layers=1,
    )
    pipe = diffusers.ChromaPipeline(transformer=transformer, vae=flow_vae(), scheduler=flow_scheduler(), **NO_TEXT)
    arguments = guided("prompt_attention_mask", **IMAGE_SIZE)
    for prefix in ("", "negative_"):
        arguments[f"{prefix}prompt_attention_mask"] = text_mask(dtype=torch.float32)
    return Parts(pipe, arguments)


@_register("auraflow")
def _auraflow(blocks: int) -> Parts:
    transformer = diffusers.AuraFlowTransformer2DModel(
        **ATTENTION,
        sample_size=8,
        **LATENTS,
        **split_blocks(blocks, ("num_mmdit_layers", "num_single_dit_layers")),
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=HIDDEN,
        pos_embed_max_size=256,
    )
    transformer.time_step_proj.linear_2.weight.data.mul_(4.0)  # its gates have no biases and start out faint
    pipe = diffusers.AuraFlowPipeline(transformer=transformer, vae=image_vae(), scheduler=flow_scheduler(), **NO_TEXT)
    return Parts(pipe, guided("prompt_attention_mask", **IMAGE_SIZE))


@_register("lumina2")
def _lumina2(blocks: int) -> Parts:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        hidden_size=HIDDEN,
        num_layers=blocks,
        num_refiner_layers=1,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=ROPE_AXES,
        axes_lens=(64, 64, 64),
        cap_feat_dim=TEXT_DIM,
    )
    pipe = diffusers.Lumina2Pipeline(
        transformer=transformer, vae=flow_vae(levels=4), scheduler=flow_scheduler(shift=6.0), **NO_TEXT
    )
    return Parts(pipe, guided("prompt_attention_mask", **IMAGE_SIZE_8))


def _qwenimage_parts(pipeline_class: type, blocks: int, arguments: dict) -> Parts:
    transformer = diffusers.QwenImageTransformer2DModel(
        **ATTENTION,
        in_channels=PACKED_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=blocks,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=ROPE_AXES,
    )
    scheduler = flow_scheduler(use_dynamic_shifting=True)
    pipe = pipeline_class(transformer=transformer, vae=qwen_vae(), scheduler=scheduler, **NO_TEXT)
    return Parts(pipe, guided("prompt_embeds_mask", **IMAGE_SIZE_8, **arguments))


@_register("qwenimage")
def _qwenimage(blocks: int) -> Parts:
    return _qwenimage_parts(diffusers.QwenImagePipeline, blocks, {})


@_register("qwenimage_img2img")
def _qwenimage_img2img(blocks: int) -> Parts:
    arguments = {"image": image_tensor(8 * HEIGHT, 8 * WIDTH), "strength": STRENGTH}
    return _qwenimage_parts(diffusers.QwenImageImg2ImgPipeline, blocks, arguments)


@_register("zimage")
def _zimage(blocks: int) -> Parts:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=HIDDEN,
        n_layers=blocks,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_DIM,
        axes_dims=list(ROPE_AXES),
        axes_lens=[128, 64, 64],
    )
    pipe = diffusers.ZImagePipeline(
        transformer=transformer, vae=flow_vae(), scheduler=flow_scheduler(shift=3.0), **NO_TEXT
    )
    prompts = {"prompt_embeds": [text_states()[0]], "negative_prompt_embeds": [text_states()[0]]}
    return Parts(pipe, {**prompts, **IMAGE_SIZE})


@_register("cogview3plus")
def _cogview3plus(blocks: int) -> Parts:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        **ATTENTION,
        **LATENTS,
        num_layers=blocks,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=HIDDEN,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=8,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    pipe = diffusers.CogView3PlusPipeline(transformer=transformer, vae=image_vae(), scheduler=scheduler, **NO_TEXT)
    return Parts(pipe, guided(**IMAGE_SIZE))


@_register("cogview4")
def _cogview4(blocks: int) -> Parts:
    transformer = diffusers.CogView4Transformer2DModel(
        **ATTENTION,
        **LATENTS,
        num_layers=blocks,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=HIDDEN,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = flow_scheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
    )
    vae = image_vae(levels=2)  # sizes have to be multiples of 16
    pipe = diffusers.CogView4Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **NO_TEXT)
    return Parts(pipe, guided(height=2 * HEIGHT, width=2 * WIDTH))


@_register("hunyuan_image")
def _hunyuan_image(blocks: int) -> Parts:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        **ATTENTION,
        **LATENTS,
        **split_blocks(blocks),
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=TEXT_DIM,
        rope_axes_dim=(8, 8),
    )
    pipe = diffusers.HunyuanImagePipeline(
        transformer=transformer,
        vae=hunyuan_image_vae(),
        scheduler=flow_scheduler(shift=5.0),
        guider=diffusers.AdaptiveProjectedMixGuidance(),
        **NO_TEXT_2,
    )
    arguments = guided("prompt_embeds_mask", height=32, width=64)
    for prefix in ("", "negative_"):
        arguments[f"{prefix}prompt_embeds_2"] = text_states()
        arguments[f"{prefix}prompt_embeds_mask_2"] = text_mask()
    return Parts(pipe, arguments)


@_register("prx")
def _prx(blocks: int) -> Parts:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        context_in_dim=TEXT_DIM,
        hidden_size=HIDDEN,
        mlp_ratio=2.0,
        num_heads=HEADS,
        depth=blocks,
        axes_dim=[8, 8],
    )
    pipe = diffusers.PRXPipeline(
        transformer=transformer, vae=flow_vae(), scheduler=flow_scheduler(shift=3.0), **NO_TEXT
    )
    arguments = guided("prompt_attention_mask", **IMAGE_SIZE, use_resolution_binning=False)
    return Parts(pipe, arguments)


@_register("krea2", needs="Krea2Pipeline")
def _krea2(blocks: int) -> Parts:
    text_layers = 3
    transformer = diffusers.Krea2Transformer2DModel(
        **ATTENTION,
        in_channels=PACKED_CHANNELS,
        num_layers=blocks,
        num_key_value_heads=1,
        intermediate_size=2 * HIDDEN,
        timestep_embed_dim=HIDDEN,
        text_hidden_dim=TEXT_DIM,
        num_text_layers=text_layers,
        text_num_attention_heads=HEADS,
        text_num_key_value_heads=HEADS,
        text_intermediate_size=HIDDEN,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=ROPE_AXES,
    )
    pipe = diffusers.Krea2Pipeline(
        transformer=transformer,
        vae=qwen_vae(),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        text_encoder_select_layers=tuple(range(text_layers)),
        **NO_TEXT,
    )
    arguments: dict = {**IMAGE_SIZE_8}
    for prefix in ("", "negative_"):
        arguments[f"{prefix}prompt_embeds"] = torch.randn(1, TEXT_TOKENS, text_layers, TEXT_DIM)
        arguments[f"{prefix}prompt_embeds_mask"] = text_mask(dtype=torch.bool)
    return Parts(pipe, arguments)


# --- videos ----------------------------------------------------------------------------------------------------------


def _cogvideox_parts(pipeline_class: type, blocks: int, rotary: bool, arguments: dict) -> Parts:
    transformer = diffusers.CogVideoXTransformer3DModel(
        **ATTENTION,
        **LATENTS,
        time_embed_dim=HIDDEN,
        text_embed_dim=TEXT_DIM,
        num_layers=blocks,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=rotary,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    pipe = pipeline_class(transformer=transformer, vae=cogvideox_vae(), scheduler=scheduler, **NO_TEXT)
    return Parts(pipe, guided(height=32, width=32, **arguments))


@_register("cogvideox")
def _cogvideox(blocks: int) -> Parts:
    return _cogvideox_parts(diffusers.CogVideoXPipeline, blocks, rotary=False, arguments={"num_frames": 9})


@_register("cogvideox_v2v")
def _cogvideox_v2v(blocks: int) -> Parts:
    arguments = {"video": torch.rand(1, 9, 3, 32, 32), "strength": STRENGTH}
    return _cogvideox_parts(diffusers.CogVideoXVideoToVideoPipeline, blocks, rotary=True, arguments=arguments)


def _ltx_parts(pipeline_class: type, blocks: int, arguments: dict) -> Parts:
    transformer = diffusers.LTXVideoTransformer3DModel(
        **ATTENTION, **LATENTS, cross_attention_dim=HIDDEN, num_layers=blocks, caption_channels=TEXT_DIM
    )
    scheduler = flow_scheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    pipe = pipeline_class(transformer=transformer, vae=ltx_vae(), scheduler=scheduler, **NO_TEXT)
    size = {"height": 32, "width": 64, "num_frames": 9}
    return Parts(pipe, guided("prompt_attention_mask", **size, **arguments))


@_register("ltx")
def _ltx(blocks: int) -> Parts:
    return _ltx_parts(diffusers.LTXPipeline, blocks, {})


@_register("ltx_i2v")
def _ltx_i2v(blocks: int) -> Parts:
    return _ltx_parts(diffusers.LTXImageToVideoPipeline, blocks, {"image": image_tensor(32, 64)})


WAN_SIZE = {"height": 48, "width": 64, "num_frames": 9}


def _wan_options(blocks: int) -> dict:
    return {
        **ATTENTION,
        **LATENTS,
        "text_dim": TEXT_DIM,
        "freq_dim": HIDDEN,
        "ffn_dim": 2 * HIDDEN,
        "num_layers": blocks,
        "rope_max_seq_len": 32,
    }


@_register("wan")
def _wan(blocks: int) -> Parts:
    transformer = diffusers.WanTransformer3DModel(**_wan_options(blocks))
    pipe = diffusers.WanPipeline(transformer=transformer, vae=wan_vae(), scheduler=flow_unipc(3.0), **NO_TEXT)
    return Parts(pipe, guided(**WAN_SIZE))


@_register("wan22")
def _wan22(blocks: int) -> Parts:
    pipe = diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(**_wan_options(blocks)),
        transformer_2=diffusers.WanTransformer3DModel(**_wan_options(blocks)),
        boundary_ratio=0.875,
        vae=wan_vae(),
        scheduler=flow_unipc(3.0),
        **NO_TEXT,
    )
    return Parts(pipe, guided(**WAN_SIZE), ("transformer", "transformer_2"))


@_register("wan_i2v")
def _wan_i2v(blocks: int) -> Parts:
    # Besides the noise the model gets the first frame: its latents, and a mask of 4 channels.
    options = {**_wan_options(blocks), "in_channels": 2 * LATENT_CHANNELS + 4}
    vision = transformers.CLIPVisionConfig(
        hidden_size=TEXT_DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=8,
        patch_size=4,
    )
    pipe = diffusers.WanImageToVideoPipeline(
        transformer=diffusers.WanTransformer3DModel(**options, image_dim=TEXT_DIM, added_kv_proj_dim=HIDDEN),
        vae=wan_vae(),
        scheduler=flow_unipc(3.0),
        image_encoder=transformers.CLIPVisionModel(vision),
        image_processor=transformers.CLIPImageProcessorPil(size=8, crop_size=8),
        **NO_TEXT,
    )
    # The attention takes the last 512 tokens for text and all before them for the image.
    return Parts(pipe, guided(tokens=512, image=image_picture(48, 64), **WAN_SIZE))


@_register("skyreels_v2")
def _skyreels_v2(blocks: int) -> Parts:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**_wan_options(blocks))
    pipe = diffusers.SkyReelsV2Pipeline(transformer=transformer, vae=wan_vae(), scheduler=flow_unipc(8.0), **NO_TEXT)
    return Parts(pipe, guided(**WAN_SIZE))


@_register("sana_video")
def _sana_video(blocks: int) -> Parts:
    transformer = diffusers.SanaVideoTransformer3DModel(
        **ATTENTION,
        **LATENTS,
        num_layers=blocks,
        **CROSS_ATTENTION,
        caption_channels=TEXT_DIM,
        sample_size=8,
        rope_max_seq_len=32,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    pipe = diffusers.SanaVideoPipeline(transformer=transformer, vae=wan_vae(), scheduler=scheduler, **NO_TEXT)
    arguments = guided(
        mask="prompt_attention_mask", height=32, width=64, frames=9, negative_prompt=None, use_resolution_binning=False
    )
    return Parts(pipe, arguments)


@_register("hunyuan_video")
def _hunyuan_video(blocks: int) -> Parts:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **ATTENTION,
        **LATENTS,
        **split_blocks(blocks),
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        rope_axes_dim=ROPE_AXES,
    )
    pipe = diffusers.HunyuanVideoPipeline(
        transformer=transformer, vae=hunyuan_video_vae(), scheduler=flow_scheduler(shift=7.0), **NO_TEXT_2
    )
    prompt = {
        "prompt_embeds": text_states(),
        "pooled_prompt_embeds": torch.randn(1, TEXT_DIM),
        "prompt_attention_mask": text_mask(),
    }
    return Parts(pipe, {**prompt, "height": 32, "width": 64, "num_frames": 9})


@_register("hunyuan_video15")
def _hunyuan_video15(blocks: int) -> Parts:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        **ATTENTION,
        in_channels=2 * LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        num_layers=blocks,
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=TEXT_DIM,
        image_embed_dim=TEXT_DIM,
        rope_axes_dim=ROPE_AXES,
        target_size=64,
        task_type="t2v",
    )
    pipe = diffusers.HunyuanVideo15Pipeline(
        transformer=transformer,
        vae=hunyuan_video15_vae(),
        scheduler=flow_scheduler(shift=5.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
        **NO_TEXT_2,
    )
    pipe.vision_num_semantic_tokens = 9  # 729 zeros stand for the missing image; fewer do as well
    arguments = guided("prompt_embeds_mask", height=64, width=64, num_frames=9)
    for prefix in ("", "negative_"):
        arguments[f"{prefix}prompt_embeds_2"] = text_states()
        arguments[f"{prefix}prompt_embeds_mask_2"] = text_mask()
    return Parts(pipe, arguments)


@_register("mochi")
def _mochi(blocks: int) -> Parts:
    channels = 12  # the pipeline's decoding knows no other number
    transformer = diffusers.MochiTransformer3DModel(
        **ATTENTION,
        num_layers=blocks,
        pooled_projection_dim=TEXT_DIM,
        in_channels=channels,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=HIDDEN,
        max_sequence_length=TEXT_TOKENS,
    )
    pipe = diffusers.MochiPipeline(
        transformer=transformer, vae=mochi_vae(channels), scheduler=flow_scheduler(invert_sigmas=True), **NO_TEXT
    )
    return Parts(pipe, guided("prompt_attention_mask", height=32, width=64, num_frames=13))


@_register("latte")
def _latte(blocks: int) -> Parts:
    transformer = diffusers.LatteTransformer3DModel(
        **ATTENTION,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=blocks,
        cross_attention_dim=HIDDEN,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_DIM,
        video_length=4,
    )
    scheduler = diffusers.DDIMScheduler(**MILD_NOISE_UNCLIPPED)
    pipe = diffusers.LattePipeline(transformer=transformer, vae=image_vae(), scheduler=scheduler, **NO_TEXT)
    size = {"height": HEIGHT, "width": HEIGHT, "video_length": 4}
    return Parts(pipe, guided(**size, negative_prompt=None, mask_feature=False))


@_register("allegro")
def _allegro(blocks: int) -> Parts:
    head_dim = 24  # the rotary embedding needs three equal parts of even size
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=head_dim,
        **LATENTS,
        num_layers=blocks,
        cross_attention_dim=HEADS * head_dim,
        sample_height=4,
        sample_width=8,
        sample_frames=2,
        caption_channels=TEXT_DIM,
    )
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**MILD_NOISE)
    pipe = diffusers.AllegroPipeline(transformer=transformer, vae=allegro_vae(), scheduler=scheduler, **NO_TEXT)
    size = {"height": 32, "width": 64, "num_frames": 8}
    return Parts(pipe, guided("prompt_attention_mask", **size, negative_prompt=None))


class _PermissiveChecker:
    """Stands where Cosmos wants its safety checker; without it the pipeline refuses to run."""

    def to(self, device: torch.device | str) -> _PermissiveChecker:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: numpy.ndarray) -> numpy.ndarray:
        return frames


@_register("cosmos")
def _cosmos(blocks: int) -> Parts:
    transformer = diffusers.CosmosTransformer3DModel(
        **ATTENTION,
        **LATENTS,
        num_layers=blocks,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        adaln_lora_dim=8,
        max_size=(4, 16, 16),
        concat_padding_mask=False,  # the other way needs torchvision
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_max=80.0, sigma_min=0.002, sigma_data=0.5, final_sigmas_type="sigma_min"
    )
    pipe = diffusers.CosmosTextToWorldPipeline(
        transformer=transformer, vae=cosmos_vae(), scheduler=scheduler, safety_checker=_PermissiveChecker(), **NO_TEXT
    )
    return Parts(pipe, guided(height=32, width=64, num_frames=9))


@_register("easyanimate")
def _easyanimate(blocks: int) -> Parts:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        **ATTENTION,
        **LATENTS,
        patch_size=2,
        sample_width=8,
        sample_height=4,
        num_layers=blocks,
        mmdit_layers=blocks,
        time_embed_dim=HIDDEN,
        text_embed_dim=TEXT_DIM,
    )
    pipe = diffusers.EasyAnimatePipeline(
        transformer=transformer, vae=magvit_vae(), scheduler=flow_scheduler(shift=5.0), **NO_TEXT
    )
    return Parts(pipe, guided("prompt_attention_mask", height=32, width=64, num_frames=5))


# --- the public part -------------------------------------------------------------------------------------------------

NAMES: tuple[str, ...] = tuple(_FACTORIES)


def build(name: str, blocks: int = 6, seed: int = 0) -> TinyPipeline:
    """Build the pipeline called `name` with `blocks` transformer blocks in its main stack."""
    if name not in _FACTORIES:
        raise KeyError(f"no tiny pipeline is called {name!r}; there are: {', '.join(NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe, arguments, denoisers = _FACTORIES[name](blocks)
        for component, model in pipe.components.items():
            if isinstance(model, torch.nn.Module):
                model.eval().requires_grad_(False)
                if component in (*denoisers, "controlnet"):
                    enliven(model)
    pipe.set_progress_bar_config(disable=True)
    return TinyPipeline(name, pipe, {"output_type": "latent", **arguments}, denoisers)


def call(tiny: TinyPipeline, steps: int = 6, seed: int = 0, **overrides: object) -> torch.Tensor:
    """Run the pipeline once and return its result as one float tensor (latents, where the pipeline gives them)."""
    arguments: dict = {
        **tiny.arguments,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        **overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a few pipelines encode an image without their generator
        if isinstance(tiny.pipe, ModularPipeline):
            result = tiny.pipe(output="images", **arguments)
        else:
            result = tiny.pipe(**arguments)[0]
    return _as_tensor(result)


def _as_tensor(result: object) -> torch.Tensor:
    """Turn a pipeline's result (tensor, array, or a list of either) into one float tensor of its own."""
    if isinstance(result, (list, tuple)):
        return torch.stack([_as_tensor(entry) for entry in result])
    return torch.as_tensor(result).detach().float().clone()
