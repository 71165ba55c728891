"""Layers: find the attention and feed-forward layers of a block, by what they hold; no registry, no class names of
models."""

from __future__ import annotations

from torch import nn

_PROJECTIONS = ("to_q", "to_qkv", "qkv", "q_proj", "qkv_proj")


def layers_of(block: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name -> (layer, "attention" or "mlp") of the direct children of a block that may turn out to be one of these.

    Whether a child really is a layer whose output can be put in its place is seen when it is called: it has to run
    once, and an mlp takes one tensor of tokens and gives one (a norm with an embedding takes two, an embedding has no
    tokens).
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, child in block.named_children():
        if is_attention(child):
            found[name] = (child, "attention")
        elif any(isinstance(inner, nn.Linear) for inner in child.modules()) and "norm" not in name:
            found[name] = (child, "mlp")
    return found


def is_attention(module: nn.Module) -> bool:
    """True where a module projects to queries itself, has an attention processor, or is torch's own attention."""
    own = isinstance(module, nn.MultiheadAttention) or hasattr(module, "processor")
    return own or any(hasattr(module, name) for name in _PROJECTIONS)
