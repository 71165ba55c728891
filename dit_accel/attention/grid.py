"""Token grid: how the tokens of one attention call lie in time and space, and where the text sits among them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenGrid:
    """frames, height, width: of the image tokens, in raster order (frames slowest); text_length: tokens of text, which
    stand before the image tokens where text_first, else behind them."""

    frames: int
    height: int
    width: int
    text_length: int = 0
    text_first: bool = False

    @property
    def image_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_length
