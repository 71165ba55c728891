"""Find the token grid of an attention call: among the arguments of the denoiser's call, or by a rule of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dit_accel.attention.grid import TokenGrid
from dit_accel.denoiser.arguments import grid_of, latent_grid

GridRule = Callable[[Mapping[str, Any], int], TokenGrid | None]
"""(arguments of the denoiser call by name, tokens of the attention call) -> their grid, or `None` where unknown."""

# Whether joint attention has the text first, by how the class of the transformer begins (diffusers 0.42).
_TEXT_FIRST = {
    **dict.fromkeys(("AuraFlow", "Bria", "Chroma", "CogVideoX", "CogView4", "ConsisID", "EasyAnimate", "Flux"), True),
    **dict.fromkeys(("GlmImage", "Krea", "LongCat", "Ovis", "QwenImage"), True),
    **dict.fromkeys(("SD3", "HiDream", "Hunyuan", "Mochi", "MotifVideo"), False),
}
_REGISTERS = 8  # AuraFlow puts so many learned tokens before the text
_RULES: dict[str, GridRule] = {}


def register_grid(model_class: str, rule: GridRule) -> Callable[[], None]:
    """Say how the tokens of a model lie; returns the inverse.

    model_class: name of the transformer's class; rule: gets the arguments of the denoiser's call by name, and the
    number of tokens of an attention call; where it answers `None`, attention stays dense.

    >>> undo = register_grid("MyTransformer", lambda call, tokens: TokenGrid(1, 32, 32) if tokens == 1024 else None)
    >>> undo()
    """
    earlier = _RULES.get(model_class)
    _RULES[model_class] = rule

    def undo() -> None:
        if earlier is None:
            _RULES.pop(model_class, None)
        else:
            _RULES[model_class] = earlier

    return undo


def grid_for(
    model_class: str, config: Mapping[str, Any], arguments: Mapping[str, Any], tokens: int
) -> TokenGrid | None:
    """The grid of an attention call's tokens; `None` where no grid among the arguments accounts for all of them.

    config: of the transformer; arguments: of the denoiser's call, by name.
    Raises ValueError where a registered rule gives a grid of another number of tokens.
    """
    if model_class in _RULES:
        grid = _RULES[model_class](arguments, tokens)
        if grid is not None and grid.tokens != tokens:
            raise ValueError(
                f"The grid registered for {model_class} has {grid.tokens} tokens, but its attention has {tokens}; "
                "let the rule answer None for calls that it does not know."
            )
        return grid
    text_first = next((first for name, first in _TEXT_FIRST.items() if model_class.startswith(name)), None)
    for shape in (grid_of(arguments), latent_grid(arguments, config)):
        if shape is None:
            continue
        frames, height, width = shape
        text = tokens - frames * height * width
        if text == 0 or (text > 0 and text_first is not None and text <= _longest_text(arguments) + _REGISTERS):
            return TokenGrid(frames, height, width, text, bool(text_first) and text > 0)
    return None


def _longest_text(arguments: Mapping[str, Any]) -> int:
    """Tokens of all texts among the arguments; a larger remainder is no text, such as a second picture."""
    texts = [v for name, v in arguments.items() if name.startswith(("encoder_hidden_states", "text", "prompt"))]
    return sum(value.shape[1] for value in texts if getattr(value, "ndim", 0) == 3)
