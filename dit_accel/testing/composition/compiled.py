"""Circumstances of torch.compile. The backend "eager" traces and guards, and gives the same bits as no compiler."""

from __future__ import annotations

from typing import Any

import torch

from dit_accel.testing.composition.circumstance import Circumstance, Enter, Setting


def _fresh(setting: Setting) -> None:
    """Graphs of other cells do not count."""
    torch._dynamo.reset()
    setting.undo.callback(torch._dynamo.reset)


def blocks(fullgraph: bool = True, **options: Any) -> Enter:
    """Each kind of block as one graph. fullgraph: False allows breaks in it."""

    def enter(setting: Setting) -> None:
        _fresh(setting)
        for denoiser in setting.denoisers:
            denoiser.compile_repeated_blocks(fullgraph=fullgraph, **options)

    return enter


def in_place(**options: Any) -> Enter:
    """The whole transformer, by its own method."""

    def enter(setting: Setting) -> None:
        _fresh(setting)
        for denoiser in setting.denoisers:
            denoiser.compile(**options)

    return enter


def around(**options: Any) -> Enter:
    """The whole transformer, wrapped by the function."""

    def enter(setting: Setting) -> None:
        _fresh(setting)
        for name in setting.tiny.denoisers:
            setattr(setting.pipe, name, torch.compile(getattr(setting.pipe, name), **options))

    return enter


CIRCUMSTANCES = (
    Circumstance("compile_repeated_blocks(fullgraph=True), then apply", blocks(backend="eager")),
    Circumstance("apply, then compile_repeated_blocks(fullgraph=True)", blocks(backend="eager"), after=True, slow=True),
    Circumstance("transformer.compile(), then apply", in_place(backend="eager"), slow=True),
    Circumstance("torch.compile(transformer), then apply", around(backend="eager"), slow=True),
)
