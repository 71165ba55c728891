"""One row per diffusers transformer: a tiny configuration and forward inputs.  See `tiny_transformers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.models import embeddings


class Row(NamedTuple):
    """Number of blocks -> configuration, and (model, draws) -> keyword arguments of `forward`."""

    config: Callable[[int], dict[str, Any]]
    inputs: Callable[[Any, Draw], dict[str, Any]]


class Draw:
    """Source of all inputs of one forward: fixed draws by seed, latent and time by progress."""

    def __init__(self, seed: int, progress: float) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.progress = float(progress)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def latent(self, *shape: int) -> torch.Tensor:
        start, end = self.noise(*shape), self.noise(*shape)
        return start * (1 - self.progress) + end * self.progress

    def time(self, start: float, *shape: int) -> torch.Tensor:
        return torch.full(shape or (1,), start * (1 - self.progress))

    def ints(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator)


TEXT, TEXT_DIM, POOLED = 5, 12, 8
# Instead of the usual 1000 where the configuration has a time scale: with an untrained time embedding the output of
# these models would otherwise jump from step to step.
SLOW_TIME = 20.0
ROWS: dict[str, Row] = {}


def row(name: str, config: Callable[[int], dict[str, Any]], inputs: Callable[[Any, Draw], dict[str, Any]]) -> None:
    ROWS[name] = Row(config, inputs)


def text(d: Draw) -> torch.Tensor:
    return d.noise(1, TEXT, TEXT_DIM)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def grid(*sizes: int, columns: int = 3, offset: int = 0) -> torch.Tensor:
    """Integer coordinates of every cell of a grid, right-aligned in rows of `columns`, columns left of it zero."""
    axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    ids = torch.zeros(axes[0].numel(), columns)
    for column, axis in enumerate(axes, start=columns - len(axes) - offset):
        ids[:, column] = axis.flatten()
    return ids


def double_single(n: int, double: str = "num_layers", single: str = "num_single_layers") -> dict[str, int]:
    """Split the main stack of a two-list model: two (or one) double blocks, the rest single."""
    first = min(2, max(1, n - 1))
    return {double: first, single: max(1, n - first)}


def heads(dim: int = 16) -> dict[str, int]:
    return {"num_attention_heads": 2, "attention_head_dim": dim}


# fmt: off
# ---------------------------------------------------------------------------------------------------------------------
# Images, square latents


def image(d: Draw, start: float = 1000.0, size: int = 8) -> dict[str, Any]:
    return {
        "hidden_states": d.latent(1, 4, size, size), "encoder_hidden_states": text(d), "timestep": d.time(start),
    }


def sizes() -> dict[str, torch.Tensor]:
    return {
        "original_size": torch.tensor([[64.0, 64.0]]), "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
    }


ADA_SINGLE = {
    **heads(), "in_channels": 4, "cross_attention_dim": 32, "attention_bias": True, "sample_size": 8, "patch_size": 2,
    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False, "caption_channels": TEXT_DIM,
}
NO_SIZE = {"resolution": None, "aspect_ratio": None}

row("AuraFlowTransformer2DModel", lambda n: {
    **heads(), **double_single(n, "num_mmdit_layers", "num_single_dit_layers"), "sample_size": 8,
    "joint_attention_dim": TEXT_DIM, "caption_projection_dim": 32, "pos_embed_max_size": 64,
}, lambda m, d: image(d, 1.0))
row("CogView3PlusTransformer2DModel", lambda n: {
    **heads(), "num_layers": n, "in_channels": 4, "out_channels": 4, "text_embed_dim": TEXT_DIM,
    "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
}, lambda m, d: {**image(d), **sizes()})
row("CogView4Transformer2DModel", lambda n: {
    **heads(), "num_layers": n, "in_channels": 4, "out_channels": 4, "text_embed_dim": TEXT_DIM,
    "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (8, 8),
}, lambda m, d: {**image(d), **sizes()})
row("DiTTransformer2DModel", lambda n: {**heads(), "num_layers": n, "sample_size": 8, "num_embeds_ada_norm": 8},
    lambda m, d: {"hidden_states": d.latent(1, 4, 8, 8), "timestep": d.time(1000.0), "class_labels": d.ints(8, 1)})
row("DreamLiteTransformer2DModel",
    lambda n: {**heads(), "num_layers": n, "in_channels": 16, "norm_num_groups": 4, "cross_attention_dim": TEXT_DIM},
    lambda m, d: {"hidden_states": d.latent(1, 16, 4, 4), "encoder_hidden_states": text(d), "timestep": d.time(1000.0)})
row("ErnieImageTransformer2DModel", lambda n: {
    "hidden_size": 32, "num_attention_heads": 2, "num_layers": n, "ffn_hidden_size": 64, "in_channels": 4,
    "out_channels": 4, "text_in_dim": TEXT_DIM, "rope_axes_dim": (4, 6, 6),
}, lambda m, d: {
    "hidden_states": d.latent(1, 4, 4, 4), "timestep": d.time(1000.0), "text_bth": text(d),
    "text_lens": torch.tensor([TEXT]),
})
row("GlmImageTransformer2DModel", lambda n: {
    **heads(), "num_layers": n, "in_channels": 4, "out_channels": 4, "text_embed_dim": TEXT_DIM,
    "time_embed_dim": 8, "condition_dim": 4, "prior_vq_quantizer_codebook_size": 16,
}, lambda m, d: {
    **image(d), "prior_token_id": d.ints(16, 1, 16), "prior_token_drop": ~ones(1, 16),
    "target_size": sizes()["target_size"], "crop_coords": sizes()["crop_coords"],
})
row("HiDreamImageTransformer2DModel", lambda n: {
    **heads(), **double_single(n), "patch_size": 2, "in_channels": 4, "caption_channels": [TEXT_DIM, 10],
    "text_emb_dim": POOLED, "axes_dims_rope": (8, 4, 4), "max_resolution": (8, 8), "llama_layers": list(range(n)),
}, lambda m, d: {
    "hidden_states": d.latent(1, 4, 8, 8), "timesteps": d.time(1000.0), "encoder_hidden_states_t5": text(d),
    "encoder_hidden_states_llama3": d.noise(len(m.config.llama_layers), 1, TEXT, 10),
    "pooled_embeds": d.noise(1, POOLED),
})


def even_blocks(n: int) -> int:
    """HunyuanDiT pairs its blocks over long skips: an even number, at least four."""
    return max(4, n + n % 2)


row("HunyuanDiT2DModel", lambda n: {
    **heads(), "num_layers": even_blocks(n), "in_channels": 4, "patch_size": 2, "sample_size": 8,
    "hidden_size": 32, "cross_attention_dim": TEXT_DIM, "cross_attention_dim_t5": 16,
    "pooled_projection_dim": POOLED, "text_len": TEXT, "text_len_t5": 6,
}, lambda m, d: {
    "hidden_states": d.latent(1, 4, 8, 8), "timestep": d.time(1000.0), "encoder_hidden_states": text(d),
    "text_embedding_mask": ones(1, TEXT), "encoder_hidden_states_t5": d.noise(1, 6, 16),
    "text_embedding_mask_t5": ones(1, 6), "image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0]]),
    "style": torch.tensor([0]),
    "image_rotary_emb": embeddings.get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
})
row("HunyuanImageTransformer2DModel", lambda n: {
    **heads(), **double_single(n), "in_channels": 4, "out_channels": 4, "num_refiner_layers": 2,
    "text_embed_dim": TEXT_DIM, "text_embed_2_dim": 10, "rope_axes_dim": (8, 8),
}, lambda m, d: {
    **image(d, size=4), "encoder_attention_mask": ones(1, TEXT), "encoder_hidden_states_2": d.noise(1, 3, 10),
    "encoder_attention_mask_2": ones(1, 3),
})
row("Lumina2Transformer2DModel", lambda n: {
    "sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": n, "num_refiner_layers": 2,
    "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (8, 4, 4),
    "axes_lens": (32, 16, 16), "cap_feat_dim": TEXT_DIM,
}, lambda m, d: {**image(d, 1.0), "encoder_attention_mask": ones(1, TEXT)})
row("LuminaNextDiT2DModel", lambda n: {
    "sample_size": 8, "hidden_size": 32, "num_layers": n, "num_attention_heads": 2, "num_kv_heads": 1,
    "multiple_of": 8, "cross_attention_dim": TEXT_DIM,
}, lambda m, d: {
    **image(d, 1.0), "encoder_mask": ones(1, TEXT),
    "image_rotary_emb": embeddings.get_2d_rotary_pos_embed_lumina(16, 8, 8), "cross_attention_kwargs": {},
})
row("OmniGenTransformer2DModel", lambda n: {
    "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64,
    "num_layers": n, "pad_token_id": 0, "vocab_size": 32, "time_step_dim": 8,
    "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}, "pos_embed_max_size": 8,
}, lambda m, d: {
    "hidden_states": d.latent(1, 4, 8, 8), "timestep": d.time(1.0), "input_ids": d.ints(32, 1, TEXT),
    "input_img_latents": [], "input_image_sizes": {},
    "attention_mask": torch.ones(1, TEXT + 17, TEXT + 17).tril(), "position_ids": torch.arange(TEXT + 17)[None],
})
row("PixArtTransformer2DModel", lambda n: {**ADA_SINGLE, "num_layers": n, "out_channels": 8},
    lambda m, d: {**image(d), "added_cond_kwargs": NO_SIZE, "encoder_attention_mask": ones(1, TEXT)})
row("PRXTransformer2DModel", lambda n: {
    "in_channels": 4, "context_in_dim": TEXT_DIM, "hidden_size": 32, "num_heads": 2, "depth": n,
    "axes_dim": [8, 8],
}, lambda m, d: {**image(d, 1.0), "attention_mask": ones(1, TEXT)})
row("SanaTransformer2DModel", lambda n: {
    **heads(), "num_layers": n, "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": TEXT_DIM, "sample_size": 4,
}, lambda m, d: {**image(d, size=4), "encoder_attention_mask": ones(1, TEXT)})
row("SD3Transformer2DModel", lambda n: {
    **heads(), "num_layers": n, "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "joint_attention_dim": TEXT_DIM, "caption_projection_dim": 32, "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 8,
}, lambda m, d: {**image(d), "pooled_projections": d.noise(1, POOLED)})
row("Transformer2DModel",
    lambda n: {**ADA_SINGLE, "num_layers": n, "out_channels": 8, "use_additional_conditions": False},
    lambda m, d: {**image(d), "added_cond_kwargs": NO_SIZE, "encoder_attention_mask": ones(1, TEXT)})
row("ZImageTransformer2DModel", lambda n: {
    "in_channels": 4, "dim": 32, "n_layers": n, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": TEXT_DIM, "t_scale": SLOW_TIME, "axes_dims": [8, 4, 4], "axes_lens": [128, 16, 16],
}, lambda m, d: {"x": list(d.latent(1, 4, 1, 8, 8)), "t": d.time(1.0), "cap_feats": list(text(d))})

# ---------------------------------------------------------------------------------------------------------------------
# Images, latents packed into tokens


def packed(d: Draw, start: float = 1.0, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": d.latent(1, 16, channels), "encoder_hidden_states": text(d), "timestep": d.time(start),
    }


def flux(d: Draw, start: float = 1.0, columns: int = 3) -> dict[str, Any]:
    return {
        **packed(d, start), "img_ids": grid(4, 4, columns=columns, offset=columns - 3),
        "txt_ids": torch.zeros(TEXT, columns),
    }


FLUX = {**heads(), "in_channels": 4, "joint_attention_dim": TEXT_DIM, "axes_dims_rope": (4, 6, 6)}
SHAPES = [(1, 4, 4)]

row("BriaTransformer2DModel", lambda n: {**FLUX, **double_single(n)}, lambda m, d: flux(d, 1000.0))
row("BriaFiboTransformer2DModel", lambda n: {**FLUX, **double_single(n), "text_encoder_dim": 10},
    lambda m, d: {**flux(d, 1000.0), "text_encoder_layers": list(d.noise(len(m.caption_projection), 1, TEXT, 10))})
row("BriaFibo2Transformer2DModel", lambda n: {
    "in_channels": 4, "dim": 32, "n_layers": n, "n_refiner_layers": 2, "n_heads": 2, "cap_feat_dim": TEXT_DIM,
    "injection_layer_ids": tuple(range(1, n, 2)), "perceiver_num_layers": 1, "min_num_gist_tokens": 4,
    "max_num_gist_tokens": 8, "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 16,
    "t_scale": SLOW_TIME, "axes_dims": (8, 4, 4), "axes_lens": (32, 16, 16),
}, lambda m, d: {
    "hidden_states": d.latent(1, 4, 8, 8), "timestep": d.time(1.0),
    "encoder_hidden_states": d.noise(1, 1 + len(m.config.injection_layer_ids), TEXT, TEXT_DIM),
    "encoder_attention_mask": ones(1, TEXT),
})
row("ChromaTransformer2DModel", lambda n: {
    **FLUX, **double_single(n), "approximator_num_channels": 8, "approximator_hidden_dim": 16,
    "approximator_layers": 1,
}, lambda m, d: {**flux(d), "attention_mask": ones(1, TEXT + 16)})
row("FluxTransformer2DModel", lambda n: {**FLUX, **double_single(n), "pooled_projection_dim": POOLED},
    lambda m, d: {**flux(d), "pooled_projections": d.noise(1, POOLED)})
row("Flux2Transformer2DModel", lambda n: {
    **FLUX, **double_single(n), "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 8,
    "guidance_embeds": False,
}, lambda m, d: flux(d, columns=4))
row("Flux3Transformer2DModel", lambda n: {
    **FLUX, **double_single(n), "cond_in_channels": 4, "axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 8,
}, lambda m, d: flux(d, columns=4))


def ideogram4(m: Any, d: Draw) -> dict[str, Any]:
    length = TEXT + 16
    indicator = torch.tensor([[3] * TEXT + [2] * 16])
    position = torch.cat([torch.arange(TEXT)[:, None].expand(-1, 3), TEXT + grid(4, 4).long()])
    return {
        "hidden_states": d.latent(1, length, 4), "timestep": d.time(1.0),
        "encoder_hidden_states": d.noise(1, length, TEXT_DIM), "position_ids": position[None],
        "segment_ids": torch.ones(1, length, dtype=torch.long), "indicator": indicator,
    }


row("Ideogram4Transformer2DModel", lambda n: {
    **heads(), "in_channels": 4, "num_layers": n, "intermediate_size": 64, "adaln_dim": 8,
    "llm_features_dim": TEXT_DIM, "mrope_section": (4, 2, 2),
}, ideogram4)
row("Krea2Transformer2DModel", lambda n: {
    **heads(), "in_channels": 4, "num_layers": n, "num_key_value_heads": 1, "intermediate_size": 64,
    "timestep_embed_dim": 8, "text_hidden_dim": 16, "num_text_layers": 3, "text_num_attention_heads": 2,
    "text_num_key_value_heads": 1, "text_intermediate_size": 16, "num_layerwise_text_blocks": 2,
    "num_refiner_text_blocks": 2, "axes_dims_rope": (8, 4, 4),
}, lambda m, d: {
    "hidden_states": d.latent(1, 16, 4), "encoder_hidden_states": d.noise(1, TEXT, 3, 16),
    "timestep": d.time(1.0), "position_ids": torch.cat([torch.zeros(TEXT, 3), grid(4, 4)]),
    "encoder_attention_mask": ones(1, TEXT),
})
row("LongCatImageTransformer2DModel", lambda n: {**FLUX, **double_single(n)}, lambda m, d: flux(d))
row("NucleusMoEImageTransformer2DModel", lambda n: {
    **heads(), "in_channels": 4, "out_channels": 4, "patch_size": 1, "num_layers": n,
    "joint_attention_dim": TEXT_DIM, "axes_dims_rope": (4, 6, 6), "mlp_ratio": 6.0, "num_experts": 4,
    "moe_intermediate_dim": 16, "capacity_factors": 2.0,
}, lambda m, d: {**packed(d), "img_shapes": SHAPES, "encoder_hidden_states_mask": ones(1, TEXT)})
row("OvisImageTransformer2DModel", lambda n: {**FLUX, **double_single(n), "out_channels": 4}, lambda m, d: flux(d))
row("QwenImageTransformer2DModel", lambda n: {
    **heads(), "in_channels": 16, "out_channels": 4, "num_layers": n, "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (4, 6, 6),
}, lambda m, d: {**packed(d, channels=16), "encoder_hidden_states_mask": ones(1, TEXT), "img_shapes": [SHAPES]})
row("QwenImage21Transformer2DModel", lambda n: {
    **heads(), "in_channels": 4, "out_channels": 4, "num_layers": n, "context_in_dim": TEXT_DIM,
    "axes_dims_rope": (4, 6, 6),
}, lambda m, d: {
    **packed(d), "img_shapes": [SHAPES], "img_mask": torch.tensor([[False] * TEXT + [True] * 4]),
    "encoder_hidden_states_mask": ones(1, TEXT),
})

# ---------------------------------------------------------------------------------------------------------------------
# Videos


def video(d: Draw, start: float = 1000.0, frames: int = 2, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": d.latent(1, channels, frames, 8, 8), "encoder_hidden_states": text(d),
        "timestep": d.time(start),
    }


COGVIDEO = {
    **heads(), "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": TEXT_DIM,
    "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": TEXT,
}
WAN = {
    **heads(), "in_channels": 4, "out_channels": 4, "text_dim": TEXT_DIM, "freq_dim": 16, "ffn_dim": 64,
    "rope_max_seq_len": 32,
}
HUNYUAN_VIDEO = {
    **heads(), "in_channels": 4, "out_channels": 4, "num_refiner_layers": 2, "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": POOLED, "rope_axes_dim": (4, 6, 6),
}


def allegro_rope() -> tuple[Any, Any]:
    frequencies = embeddings.get_3d_rotary_pos_embed_allegro(24, ((0, 0), (4, 4)), (4, 4), 2)[:3]
    positions = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4))
    return frequencies, tuple(positions.T[:, None].contiguous())


row("AllegroTransformer3DModel", lambda n: {
    **heads(24), "num_layers": n, "cross_attention_dim": 48, "sample_height": 8, "sample_width": 8,
    "sample_frames": 2, "caption_channels": TEXT_DIM,
}, lambda m, d: {
    **video(d), "attention_mask": torch.ones(1, 2, 8, 8), "encoder_attention_mask": ones(1, TEXT),
    "image_rotary_emb": allegro_rope(),
})


def any_flow(d: Draw, frames: int = 2) -> dict[str, Any]:
    time = d.time(1000.0, 1, frames)
    return {
        "hidden_states": d.latent(1, frames, 4, 8, 8), "timestep": time, "r_timestep": time * 0.9,
        "encoder_hidden_states": text(d),
    }


def any_flow_far(m: Any, d: Draw) -> dict[str, Any]:
    """Second chunk of a causal rollout, the first one already in the key/value cache, as the pipeline calls it."""
    caches = {}
    for layer in range(len(m.blocks)):
        caches[layer] = {"full_cache": d.noise(2, 1, 2, 96, 16), "compressed_cache": d.noise(2, 1, 2, 8, 16)}
    return {
        **any_flow(d), "chunk_partition": [1, 2], "kv_cache": caches,
        "kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": False},
    }


row("AnyFlowTransformer3DModel", lambda n: {**WAN, "num_layers": n}, lambda m, d: any_flow(d))
row("AnyFlowFARTransformer3DModel", lambda n: {**WAN, "num_layers": n, "chunk_partition": (1, 2)}, any_flow_far)
row("ChronoEditTransformer3DModel", lambda n: {**WAN, "num_layers": n}, lambda m, d: video(d, frames=2))
row("CogVideoXTransformer3DModel", lambda n: {**COGVIDEO, "num_layers": n},
    lambda m, d: {**video(d), "hidden_states": d.latent(1, 2, 4, 8, 8)})
row("ConsisIDTransformer3DModel", lambda n: {
    **COGVIDEO, **heads(24), "num_layers": n, "is_train_face": True,
    "cross_attn_interval": 2 if n % 2 == 0 else 1, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2,
    "LFE_id_dim": 10, "LFE_vit_dim": 16, "LFE_depth": 2, "LFE_dim_head": 8, "LFE_num_heads": 2,
    "LFE_num_id_token": 2, "LFE_num_querie": 4, "LFE_output_dim": 32, "LFE_ff_mult": 2, "LFE_num_scale": 2,
}, lambda m, d: {
    **video(d), "hidden_states": d.latent(1, 2, 4, 8, 8), "id_cond": d.noise(1, 10),
    "id_vit_hidden": list(d.noise(2, 1, 3, 16)),
})
row("CosmosTransformer3DModel", lambda n: {
    **heads(), "in_channels": 4, "out_channels": 4, "num_layers": n, "mlp_ratio": 2.0, "text_embed_dim": TEXT_DIM,
    "adaln_lora_dim": 4, "max_size": (4, 16, 16), "concat_padding_mask": False,
}, lambda m, d: {**video(d, 1.0), "fps": 24})


def cosmos3(m: Any, d: Draw) -> dict[str, Any]:
    """Three text tokens and two noisy frames of 2 x 2 tokens in one packed sequence."""
    vision = torch.arange(3, 11)
    text_position = torch.arange(3)[:, None].expand(-1, 3)
    return {
        "input_ids": d.ints(32, 3), "text_indexes": torch.arange(3),
        "position_ids": torch.cat([text_position, 3 + grid(2, 2, 2).long()]).T.contiguous(), "und_len": 3,
        "sequence_length": 11, "vision_tokens": [d.latent(1, 4, 2, 2, 2)], "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": vision, "vision_mse_loss_indexes": vision, "vision_timesteps": d.time(1000.0, 8),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


row("Cosmos3OmniTransformer", lambda n: {
    "head_dim": 16, "hidden_size": 32, "intermediate_size": 64, "latent_channel": 4, "latent_patch_size": 1,
    "patch_latent_dim": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": n,
    "rope_axes_dim": [4, 2, 2], "vocab_size": 32,
}, cosmos3)
row("EasyAnimateTransformer3DModel", lambda n: {
    **heads(), "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_width": 8, "sample_height": 8,
    "num_layers": n, "mmdit_layers": n, "time_embed_dim": 8, "text_embed_dim": TEXT_DIM,
}, lambda m, d: video(d))
row("HeliosTransformer3DModel", lambda n: {
    **heads(12), "in_channels": 4, "out_channels": 4, "text_dim": TEXT_DIM, "freq_dim": 16, "ffn_dim": 48,
    "num_layers": n, "rope_dim": (4, 4, 4),
}, lambda m, d: {
    **video(d), "indices_hidden_states": torch.tensor([[7, 8]]),
    "indices_latents_history_short": torch.tensor([[6]]), "indices_latents_history_mid": torch.tensor([[4, 5]]),
    "indices_latents_history_long": torch.tensor([[0, 1, 2, 3]]), "latents_history_short": d.noise(1, 4, 1, 8, 8),
    "latents_history_mid": d.noise(1, 4, 2, 8, 8), "latents_history_long": d.noise(1, 4, 4, 8, 8),
})
row("HunyuanVideoTransformer3DModel", lambda n: {**HUNYUAN_VIDEO, **double_single(n)}, lambda m, d: {
    **video(d), "encoder_attention_mask": ones(1, TEXT), "pooled_projections": d.noise(1, POOLED),
    "guidance": torch.tensor([6000.0]),
})
row("HunyuanVideo15Transformer3DModel", lambda n: {
    **heads(), "in_channels": 4, "out_channels": 4, "num_layers": n, "num_refiner_layers": 2,
    "text_embed_dim": TEXT_DIM, "text_embed_2_dim": 10, "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6),
}, lambda m, d: {
    **video(d), "hidden_states": d.latent(1, 4, 2, 4, 4), "encoder_attention_mask": ones(1, TEXT),
    "encoder_hidden_states_2": d.noise(1, 3, 10), "encoder_attention_mask_2": ones(1, 3),
    "image_embeds": d.noise(1, 3, 8),
})
row("HunyuanVideoFramepackTransformer3DModel", lambda n: {
    **HUNYUAN_VIDEO, **double_single(n), "has_image_proj": True, "image_proj_dim": 8,
    "has_clean_x_embedder": True,
}, lambda m, d: {
    **video(d), "hidden_states": d.latent(1, 4, 2, 4, 4), "encoder_attention_mask": ones(1, TEXT),
    "pooled_projections": d.noise(1, POOLED), "image_embeds": d.noise(1, 3, 8),
    "indices_latents": torch.arange(8, 10), "guidance": torch.tensor([6000.0]),
    "latents_clean": d.noise(1, 4, 2, 4, 4), "indices_latents_clean": torch.arange(6, 8),
    "latents_history_2x": d.noise(1, 4, 2, 4, 4), "indices_latents_history_2x": torch.arange(4, 6),
    "latents_history_4x": d.noise(1, 4, 4, 4, 4), "indices_latents_history_4x": torch.arange(4),
})
JOY = {
    "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": TEXT_DIM, "mlp_width_ratio": 2.0,
    "rope_dim_list": [4, 6, 6],
}
row("JoyImageEditTransformer3DModel", lambda n: {**JOY, "num_layers": n}, lambda m, d: video(d))
row("JoyImageEditPlusTransformer3DModel", lambda n: {**JOY, "num_layers": n}, lambda m, d: {
    **video(d), "hidden_states": d.latent(1, 32, 4, 1, 2, 2), "encoder_hidden_states_mask": torch.ones(1, TEXT),
    "shape_list": [[(1, 4, 4), (1, 4, 4)]],
})
KANDINSKY = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT_DIM, "in_text_dim2": POOLED, "time_dim": 16,
    "model_dim": 32, "ff_dim": 64, "num_text_blocks": 2, "axes_dims": (4, 6, 6), "visual_cond": False,
}


def kandinsky(d: Draw) -> dict[str, Any]:
    return {
        **video(d), "hidden_states": d.latent(1, 2, 8, 8, 4), "pooled_projections": d.noise(1, POOLED),
    }


row("Kandinsky5Transformer3DModel", lambda n: {**KANDINSKY, "num_visual_blocks": n}, lambda m, d: {
    **kandinsky(d), "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
    "text_rope_pos": torch.arange(TEXT),
})
row("Kandinsky6Transformer3DModel",
    lambda n: {**KANDINSKY, "num_visual_blocks": n, "in_audio_dim": 4, "out_audio_dim": 4},
    lambda m, d: {**kandinsky(d), "audio_hidden_states": d.latent(1, 6, 4)})
row("Kandinsky6SRTransformer3DModel", lambda n: {
    "in_visual_dim": 2, "out_visual_dim": 4, "time_dim": 16, "model_dim": 32, "ff_dim": 64,
    "num_visual_blocks": n, "axes_dims": (4, 6, 6),
}, lambda m, d: {"hidden_states": d.latent(1, 2, 8, 8, 5), "timestep": d.time(1000.0)})
row("LatteTransformer3DModel", lambda n: {**ADA_SINGLE, "num_layers": n, "video_length": 2}, lambda m, d: video(d))
LTX = {**heads(), "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "caption_channels": TEXT_DIM}
LTX2 = {
    **LTX, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
}
row("LTXVideoTransformer3DModel", lambda n: {**LTX, "num_layers": n}, lambda m, d: {
    **packed(d, 1000.0), "encoder_attention_mask": ones(1, TEXT), "num_frames": 1, "height": 4, "width": 4,
})
row("LTX2VideoTransformer3DModel", lambda n: {**LTX2, "num_layers": n}, lambda m, d: {
    **packed(d, 1000.0), "audio_hidden_states": d.latent(1, 6, 4), "audio_encoder_hidden_states": text(d),
    "encoder_attention_mask": ones(1, TEXT), "audio_encoder_attention_mask": ones(1, TEXT), "num_frames": 1,
    "height": 4, "width": 4, "audio_num_frames": 6,
})


def minimax_h3(m: Any, d: Draw) -> dict[str, Any]:
    """Text, audio and video rows in one packed sequence, video and audio each with an own timestep."""
    tags = torch.tensor([1] * TEXT + [2] * 4 + [0] * 16)
    position = grid(4, 4)
    return {
        "hidden_states": d.latent(1, 16, 16), "audio_hidden_states": d.latent(1, 4, 6),
        "encoder_hidden_states": text(d), "timestep": d.time(1.0, 2) * torch.tensor([1.0, 0.9]),
        "timestep_indices": (tags == 2).long(), "token_tags": tags,
        "position_ids": torch.cat([torch.arange(TEXT + 4.0)[:, None].expand(-1, 3), TEXT + 4 + position]),
        "video_indices": torch.arange(TEXT + 4, TEXT + 20), "audio_indices": torch.arange(TEXT, TEXT + 4),
        "text_indices": torch.arange(TEXT),
    }


row("MiniMaxH3Transformer3DModel", lambda n: {
    **heads(), "hidden_size": 24, "num_layers": n, "num_refiner_layers": 2, "ffn_dim": 48, "in_channels": 4,
    "audio_in_channels": 6, "text_dim": TEXT_DIM, "freq_dim": 8, "time_embed_hidden_dim": 24,
    "time_embed_dim": 16, "rope_freq_dim": 2,
}, minimax_h3)
row("MochiTransformer3DModel", lambda n: {
    **heads(), "num_layers": n, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16,
    "time_embed_dim": 8, "max_sequence_length": TEXT,
}, lambda m, d: {
    **video(d), "encoder_hidden_states": d.noise(1, TEXT, 16), "encoder_attention_mask": ones(1, TEXT),
})
row("MotifVideoTransformer3DModel", lambda n: {
    **heads(), **double_single(n), "num_decoder_layers": 1 if n > 3 else 0, "in_channels": 4, "out_channels": 4,
    "text_embed_dim": TEXT_DIM, "rope_axes_dim": (4, 6, 6), "enable_text_cross_attention_dual": True,
    "enable_text_cross_attention_single": True,
}, lambda m, d: {**video(d), "encoder_attention_mask": ones(1, TEXT)})
row("SanaVideoTransformer3DModel", lambda n: {
    **heads(), "in_channels": 4, "out_channels": 4, "num_layers": n, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": TEXT_DIM, "sample_size": 8,
    "rope_max_seq_len": 32,
}, lambda m, d: {**video(d), "encoder_attention_mask": ones(1, TEXT)})


def sana_wm(m: Any, d: Draw) -> dict[str, Any]:
    """Three frames, the first one a clean anchor, seen by a camera that moves forward."""
    camera = torch.eye(4).repeat(3, 1, 1)
    camera[:, 2, 3] = torch.linspace(0.0, 0.5, 3)
    intrinsics = torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(3, -1)
    time = d.time(1000.0, 1, 1, 3)
    time[..., 0] = 0
    return {
        "hidden_states": d.latent(1, 4, 3, 4, 4), "timestep": time, "encoder_hidden_states": text(d)[:, None],
        "mask": torch.ones(1, TEXT, dtype=torch.long),
        "camera_conditions": torch.cat([camera.flatten(1), intrinsics], dim=1)[None],
        "chunk_plucker": d.noise(1, 6, 3, 4, 4),
    }


row("SanaWMTransformer3DModel", lambda n: {
    "in_channels": 4, "num_layers": n, "hidden_size": 32, "num_attention_heads": 2, "linear_head_dim": 16,
    "chunk_plucker_channels": 6, "chunk_plucker_post_attn_blocks": n, "caption_channels": TEXT_DIM,
    "mlp_ratio": 2.0,
}, sana_wm)
row("SanaWMLTX2RefinerTransformer3DModel", lambda n: {**LTX2, "num_layers": n}, lambda m, d: {
    **packed(d, 1000.0), "timestep": d.time(1000.0, 1, 16),
    "video_rotary_emb": m.build_rotary_emb_for_absolute_positions(1, [3], 4, 4, torch.device("cpu"), 24.0),
    "encoder_attention_mask": ones(1, TEXT),
})
row("SkyReelsV2Transformer3DModel", lambda n: {**WAN, "num_layers": n}, lambda m, d: video(d))
row("WanTransformer3DModel", lambda n: {**WAN, "num_layers": n}, lambda m, d: video(d))
row("WanAnimateTransformer3DModel", lambda n: {
    **WAN, "num_layers": n, "in_channels": 12, "latent_channels": 4, "image_dim": 8,
    "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4}, "motion_encoder_size": 16, "motion_style_dim": 8,
    "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": n,
}, lambda m, d: {
    **video(d, frames=3, channels=12), "encoder_hidden_states_image": d.noise(1, 3, 8),
    "pose_hidden_states": d.noise(1, 4, 2, 8, 8), "face_pixel_values": d.noise(1, 3, 5, 16, 16),
})


def wan_animate_2(m: Any, d: Draw) -> dict[str, Any]:
    """A generation step of three frames on cached keys and values of two reference frames."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    device = m.patch_embedding.weight.device
    cache = WanAnimate2KVCache(len(m.blocks))
    for layer in cache.layer_caches:
        layer.store(d.noise(1, 8, 2, 16).to(device), d.noise(1, 8, 2, 16).to(device))
    if (2, 4) not in m.block_masks:  # left alone, the model compiles this mask in its forward, for many seconds
        with torch.compiler.set_stance("force_eager"):
            m.block_masks[(2, 4)] = m.create_mask(2, 4, device)
    return {
        "hidden_states": [d.latent(4, 3, 4, 4)], "timestep": d.time(1000.0),
        "encoder_hidden_states": [d.noise(TEXT, TEXT_DIM)], "condition_latents": [d.noise(4, 3, 4, 4)],
        "encoder_hidden_states_image": d.noise(1, 3, 1280), "kv_cache": cache, "kv_cache_mode": "cached",
        "seq_len": 12, "reference_grid_sizes": torch.tensor([[2, 2, 2]]), "origin_len": 5, "origin_area": [32, 32],
    }


row("WanAnimate2Transformer3DModel", lambda n: {
    "text_len": 8, "in_dim": 8, "dim": 32, "ffn_dim": 64, "freq_dim": 16, "text_dim": TEXT_DIM, "out_dim": 4,
    "num_heads": 2, "num_layers": n,
}, wan_animate_2)
row("WanVACETransformer3DModel",
    lambda n: {**WAN, "num_layers": n, "vace_layers": list(range(0, n, 2)), "vace_in_channels": 6},
    lambda m, d: {**video(d), "control_hidden_states": d.noise(1, 6, 2, 8, 8)})

# ---------------------------------------------------------------------------------------------------------------------
# Audio, embeddings, proteins and the rest

row("AceStepTransformer1DModel", lambda n: {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": n, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "in_channels": 12, "audio_acoustic_hidden_dim": 4,
    "sliding_window": 4, "encoder_hidden_size": TEXT_DIM,
}, lambda m, d: {**packed(d), "timestep_r": d.time(1.0), "context_latents": d.noise(1, 16, 8)})
row("LongCatAudioDiTTransformer",
    lambda n: {"dit_dim": 32, "dit_depth": n, "dit_heads": 2, "dit_text_dim": TEXT_DIM, "latent_dim": 4},
    lambda m, d: {
        **packed(d), "encoder_attention_mask": ones(1, TEXT), "attention_mask": ones(1, 16),
        "latent_cond": d.noise(1, 16, 4),
    })
row("MiniMaxMusic3RVQDepthDecoder", lambda n: {
    "hidden_size": 32, "num_layers": n, "num_attention_heads": 2, "intermediate_size": 64, "audio_vocab_size": 16,
    "num_codebooks": 4,
}, lambda m, d: {"inputs_embeds": d.latent(1, 5, 32)})
row("MiniMaxMusic3Transformer1DModel", lambda n: {
    **heads(), "in_channels": 4, "condition_dim": TEXT_DIM, "num_layers": n, "ff_inner_dim": 64, "rotary_dim": 8,
    "fourier_embedding_dim": 8,
}, lambda m, d: {
    "hidden_states": d.latent(1, 4, 16), "timestep": d.time(1.0),
    "encoder_hidden_states": d.noise(1, 16, TEXT_DIM),
})
row("PriorTransformer", lambda n: {**heads(), "num_layers": n, "embedding_dim": TEXT_DIM, "num_embeddings": TEXT},
    lambda m, d: {
        "hidden_states": d.latent(1, TEXT_DIM), "timestep": d.time(1000.0), "proj_embedding": d.noise(1, TEXT_DIM),
        "encoder_hidden_states": text(d), "attention_mask": ones(1, TEXT),
    })
PROTEIN = 12


def proteina(m: Any, d: Draw) -> dict[str, Any]:
    """A chain of residues in nanometres, two of them given as context, no further annotation."""
    context = torch.arange(PROTEIN)[None] < 2
    chain = torch.arange(PROTEIN)
    return {
        "bb_ca": d.latent(1, PROTEIN, 3), "local_latents": d.latent(1, PROTEIN, 4), "bb_ca_time": d.time(1.0),
        "local_latents_time": d.time(1.0), "padding_mask": ones(1, PROTEIN),
        "token_type": torch.zeros(1, PROTEIN, dtype=torch.long), "atom37_mask": ones(1, PROTEIN, 37),
        "conditioning": {
            "is_in_context_conditioning": context, "supports_local_latent": ~context,
            "token_bond_path_length": (chain[:, None] - chain).abs()[None],
            "molecule_iid": torch.zeros(1, PROTEIN, dtype=torch.long),
            "condition_hydrophobic_1_atom": d.ints(2, 1, PROTEIN, 37),
        },
    }


row("RFD4ProteinaTransformer", lambda n: {
    "nlayers": n, "token_dim": 32, "nheads": 2, "dim_cond": 16, "pair_repr_dim": 16, "latent_dim": 4,
    "token_type_emb_dim": 4, "cath_emb_dim": 4, "t_emb_dim": 16, "seq_sep_dim": 8, "xt_pair_dist_dim": 6,
    "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type", "sequence_probabilities", "hydrophobic"),
    "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
    "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask", "token_bond_path_length", "molecule_idx_pair"),
    "tri_mult_c": 8, "num_sequence_classes": 20,
}, proteina)
row("StableAudioDiTModel", lambda n: {
    **heads(), "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": n,
    "num_key_value_attention_heads": 1, "cross_attention_dim": 16, "time_proj_dim": 8,
    "global_states_input_dim": POOLED, "cross_attention_input_dim": TEXT_DIM,
}, lambda m, d: {
    "hidden_states": d.latent(1, 4, 16), "timestep": d.time(1.0), "encoder_hidden_states": text(d),
    "global_hidden_states": d.noise(1, 1, POOLED),
    "rotary_embedding": embeddings.get_1d_rotary_pos_embed(8, 17, use_real=True, repeat_interleave_real=False),
})
row("StableAudio3DiTModel", lambda n: {
    "io_channels": 4, "embed_dim": 32, "depth": n, "num_heads": 2, "cond_token_dim": TEXT_DIM,
    "global_cond_dim": POOLED, "local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 2.0,
    "num_memory_tokens": 4,
}, lambda m, d: {
    "hidden_states": d.latent(1, 4, 16), "timestep": d.time(1.0), "encoder_hidden_states": text(d),
    "global_hidden_states": d.noise(1, POOLED), "encoder_attention_mask": ones(1, TEXT),
    "local_add_cond": d.noise(1, 5, 16),
})
row("T5FilmDecoder", lambda n: {
    "input_dims": 8, "targets_length": 8, "d_model": 32, "num_layers": n, "num_heads": 2, "d_kv": 16, "d_ff": 64,
}, lambda m, d: {
    "encodings_and_masks": [(d.noise(1, TEXT, 32), ones(1, TEXT))], "decoder_input_tokens": d.latent(1, 8, 8),
    "decoder_noise_time": d.time(1.0),
})
row("TransformerTemporalModel", lambda n: {**heads(), "num_layers": n, "in_channels": 16, "norm_num_groups": 4},
    lambda m, d: {"hidden_states": d.latent(3, 16, 2, 2), "timestep": d.time(1000.0), "num_frames": 3})
