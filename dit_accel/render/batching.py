"""Batching: several items in one call, each with its own generator; and less at once where memory runs out."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.calls import Caller, pictures_of
from dit_accel.errors import ArgumentError, DitAccelError
from dit_accel.render.fields import TEXTS
from dit_accel.render.grouping import key_of
from dit_accel.render.item import Item

_STEPS = "num_inference_steps"
_DEFAULT_STEPS = 50
_CPU_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


@dataclass(frozen=True)
class Rendered:
    """What a call made of one item. picture: image [C, H, W] or video [F, C, H, W] in [0, 1]; seconds: its share of the
    call; batch: items of the call; tiled: the VAE decoded in tiles; error: instead of a picture, one sentence."""

    item: Item
    picture: Tensor | None
    seconds: float
    batch: int
    tiled: bool = False
    error: str = ""


class ItemCaller(Caller):
    """Calls a pipeline for items. Raises ArgumentError for arguments that the pipeline does not take."""

    def check_item(self, item: Item) -> None:
        """Raise ArgumentError where an item could not be made."""
        self._set(item)
        self.check([item.prompt])

    def steps_of(self, item: Item) -> int:
        """Denoising steps: the item's, or the pipeline's default."""
        default = self.parameters[_STEPS].default if _STEPS in self.parameters else _DEFAULT_STEPS
        return item.arguments.get(_STEPS) or (default if isinstance(default, int) else _DEFAULT_STEPS)

    def make_items(self, items: Sequence[Item]) -> list[Rendered]:
        """One call for all of them."""
        self._set(items[0])
        if len(items) == 1:
            made = self.make(items[0].prompt, items[0].seed, self.steps_of(items[0]))
            pictures, seconds = made.pictures, made.seconds
        else:
            pictures, seconds = self._make_batch(items)
        if len(pictures) != len(items):
            raise ArgumentError(
                f"{type(self.pipe).__name__} made {len(pictures)} pictures for {len(items)} items; render them one by "
                "one, or leave out what multiplies them."
            )
        return [Rendered(item, picture, seconds / len(items), len(items)) for item, picture in zip(items, pictures)]

    def _make_batch(self, items: Sequence[Item]) -> tuple[Tensor, float]:
        if self.is_modular:
            raise ArgumentError("Modular pipelines are called for one item at a time.")
        texts = {key: [item.arguments[key] for item in items] for key in TEXTS if key in items[0].arguments}
        prompts = texts.pop("prompt", [None])
        call = {**self.arguments, **texts}
        for prompt in prompts:
            for key, value in self.prompt_arguments(prompt).items():
                call[key] = [*call.get(key, []), *(value if isinstance(value, list) else [value])]
        generators = [torch.Generator().manual_seed(item.seed) for item in items]
        output_type = self._output_type or "pt"
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(items[0].seed)
            steps = self.steps_of(items[0])
            result = self.pipe(**call, generator=generators, output_type=output_type, num_inference_steps=steps)
        return pictures_of(result[0]), time.perf_counter() - started

    def _set(self, item: Item) -> None:
        self.arguments = {key: value for key, value in item.arguments.items() if key not in ("prompt", _STEPS)}
        for name in self.arguments:
            self._check_known(name)


class Ladder:
    """Makes items with as much memory as there is: all at once, then halves, then one with its VAE in tiles.

    make: makes some items in one call; pipe: whose VAE may be tiled. What was too much is not tried again.
    """

    def __init__(self, make: Callable[[Sequence[Item]], list[Rendered]], pipe: Any):
        self.make, self.pipe = make, pipe
        self.most: dict[str, int] = {}  # by what the items of a batch share

    def __call__(self, items: Sequence[Item]) -> Iterator[list[Rendered]]:
        """The results, some items at a time, in order."""
        left = list(items)
        key = key_of(left[0])
        while left:
            size = min(len(left), self.most.get(key, len(left)))
            made = self._try(left[:size], key)
            if made is not None:
                yield made
                del left[:size]

    def _try(self, items: list[Item], key: str) -> list[Rendered] | None:
        try:
            return self.make(items)
        except Exception as error:
            if not is_out_of_memory(error):
                if len(items) == 1:
                    return [_failed(items[0], error)]
                # One item may have spoilt the call for the others, or the pipeline takes no lists.
                return [rendered for item in items for rendered in self._try([item], key) or ()]
        free_memory()
        if len(items) > 1:
            self.most[key] = len(items) // 2
            return None
        return self._tiled(items[0])

    def _tiled(self, item: Item) -> list[Rendered]:
        """One item, its VAE in tiles: seams may be seen, so the item's record says that it was."""
        try:
            with tiles(self.pipe) as tiled:
                if not tiled:
                    raise MemoryError
                return [replace(rendered, tiled=True) for rendered in self.make([item])]
        except Exception as error:
            if not is_out_of_memory(error):
                return [_failed(item, error)]
        free_memory()
        return [Rendered(item, None, 0.0, 1, error="Memory ran out, for this item alone as well; give a smaller size.")]


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch raises on an accelerator or on the CPU, and for Python's own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU_MEMORY)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def tiles(pipe: Any) -> Iterator[bool]:
    """Have the VAE work in tiles; gives whether it can."""
    vae: Any = getattr(pipe, "vae", None)
    was = bool(getattr(vae, "use_tiling", False))
    if was or not callable(getattr(vae, "enable_tiling", None)):
        yield False
        return
    vae.enable_tiling()
    try:
        yield True
    finally:
        vae.disable_tiling()


def _failed(item: Item, error: Exception) -> Rendered:
    text = " ".join(str(error).split()) or type(error).__name__
    name = "" if isinstance(error, DitAccelError) else f"{type(error).__name__}: "
    return Rendered(item, None, 0.0, 1, error=f"{name}{text}"[:500])
