"""Known models: public configs of large diffusion transformers, so that `explain` can count what a policy would save
without a download. Sizes come from shapes alone, on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from dit_accel.diffusers_bridge import class_name_of, class_named
from dit_accel.errors import CheckpointError, nearest, shown

_LARGEST = 4 << 20  # bytes of a config.json

# name: (class of diffusers, what differs from the defaults of its config)
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "flux.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux.1-schnell": ("FluxTransformer2DModel", {}),
    "sd3-medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    ),
    "sd3.5-large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "dit-xl-2-256": ("DiTTransformer2DModel", {"num_attention_heads": 16, "out_channels": 8}),
    "wan2.1-t2v-14b": ("WanTransformer3DModel", {}),
    "wan2.1-t2v-1.3b": ("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
}


def is_known(name: str) -> bool:
    """True for the name of a public model, or the path of a file config.json."""
    return name in KNOWN or Path(name).name == "config.json"


def skeleton(name: str) -> nn.Module:
    """A model without weights, on the meta device, by its public name or its config.json.

    Raises CheckpointError where the config cannot be read, or diffusers cannot make a model of it.
    """
    kind, config = KNOWN[name] if name in KNOWN else _read(Path(name))
    from accelerate import init_empty_weights

    found = class_named(kind)
    if found is None:
        raise CheckpointError(f"{name} is a config of {shown(kind)}, which diffusers has no model of; give another.")
    try:
        with init_empty_weights(include_buffers=True):
            return found.from_config(config)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"diffusers cannot make a {kind} of {name}: {error}") from None


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path} is larger than {_LARGEST >> 20} MiB, which no config is.")
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = nearest(path.as_posix(), KNOWN)
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Known models: {known}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from None
    kind = class_name_of(config) if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise CheckpointError(f"{path} does not say of which class it is; give the config.json of a diffusers model.")
    return kind, {key: value for key, value in config.items() if not key.startswith("_")}
