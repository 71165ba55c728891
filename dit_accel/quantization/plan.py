"""Plan: which layers of a model are quantised, and in which format each; looks at names and shapes alone, so a model on
the meta device will do."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from dit_accel.denoiser.find import find_block_lists
from dit_accel.errors import PolicyError, UnsupportedModelError
from dit_accel.weights.codebook import UNIVERSAL
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.rotation import block_of
from dit_accel.weights.vector_quant import SIZES, VectorQuant

# Layers that are called with a token for the time: norm1.linear, img_mod.1, adaLN_modulation.1, norm1.emb.timestep...
_MODULATION = re.compile(r"(^|\.)([a-z]*norm[0-9a-z_]*|[a-z_]*mod(ulation)?|ada[a-zA-Z_]*|[a-z_]*temb[a-z_]*)(\.|$)")


def is_modulation(name: str) -> bool:
    """True for layers that turn the time embedding into shifts, scales and gates, by their name."""
    return bool(_MODULATION.search(name))


def plan(model: nn.Module, settings: VectorQuant) -> dict[str, LayerFormat]:
    """Name of each layer that is quantised -> its format, in the order of the model.

    Inside the lists of blocks only: embedders and final layers stay dense. Raises UnsupportedModelError where no layer
    is left.
    """
    found: dict[str, LayerFormat] = {}
    for path, blocks in find_block_lists(model).items():
        for number, block in enumerate(blocks):
            if number < settings.keep_first or number >= len(blocks) - settings.keep_last:
                continue
            for name, layer in block.named_modules(prefix=f"{path}.{number}"):
                made = _format(name, layer, settings)
                if made is not None:
                    found[name] = made
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layer of {settings.smallest} weights or more inside its blocks, so "
            "nothing can be quantised; lower smallest, keep_first or keep_last, or give a diffusion transformer."
        )
    return found


def _format(name: str, layer: nn.Module, settings: VectorQuant) -> LayerFormat | None:
    """The format of one layer; None where it stays dense."""
    if type(layer) is nn.Linear:
        shape, kind, bias = (layer.out_features, layer.in_features), "linear", layer.bias is not None
    elif type(layer) is nn.Embedding and layer.max_norm is None and not layer.sparse:
        shape, kind, bias = (layer.num_embeddings, layer.embedding_dim), "embedding", False
    else:
        return None
    if shape[0] * shape[1] < settings.smallest or any(part in name for part in settings.dense):
        return None
    small = is_modulation(name)
    size = settings.size if settings.size and not small else SIZES[settings.modulation_bits if small else settings.bits]
    if kind == "embedding":
        size = SIZES[max(SIZES)]  # no calibration sees more than a few of its rows, and each is all of a call's class
    source = "own" if settings.codebook == "layer" else "shared"
    if settings.codebook == "universal" and size not in UNIVERSAL:
        raise PolicyError(f"There is no universal codebook {size}; give a codebook of 'model' or 'layer', or no size.")
    block = block_of(shape[1]) if settings.rotate else 0
    rank = 0 if small else min(settings.low_rank, *shape)
    if shape[1] % LayerFormat((1, 4096), size).width:
        return None
    return LayerFormat(shape, size, source, 0 if block == 1 else block, rank, bias, kind)


def shared_sizes(formats: Mapping[str, LayerFormat]) -> dict[str, tuple[int, int, int]]:
    """Size of each codebook that layers share -> [S, K, d]."""
    return {made.codebook: made.book_shape for made in formats.values() if made.source == "shared"}
