"""Watch: looks at every call of a pipeline's denoisers, so that any run can be followed, and ended within a step.

Works for every pipeline, plain or accelerated, by torch's own forward hooks: some pipelines take no callback.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_accel.denoiser.arguments import latents_in, named_arguments
from dit_accel.denoiser.find import find_denoisers
from dit_accel.render.stop import Stop


class Cancelled(BaseException):
    """Somebody asked for the run to end. No Exception, so that nothing on the way takes it for a failed item."""


@dataclass
class Watch:
    """step: denoising step in progress, from 0; seconds: time that was spent looking, which is none of the run's."""

    step: int = -1
    seconds: float = 0.0


@contextlib.contextmanager
def watching(pipe: Any, stop: Stop, told: Callable[[int, Tensor | None], None] | None = None) -> Iterator[Watch]:
    """Follow the calls of `pipe` in this block. told: (step, latents that the denoiser is given) at each new step.

    Raises Cancelled at the next call of a denoiser once the stop is asked for.
    """
    watch, time_of_step = Watch(), object()

    def before(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal time_of_step
        check(stop)
        started = time.perf_counter()
        arguments = named_arguments(module, args, kwargs)
        now = next((_plain(value) for name, value in arguments.items() if "time" in name or name == "t"), None)
        if now != time_of_step:  # guidance branches share a time step
            time_of_step, watch.step = now, watch.step + 1
            if told is not None:
                told(watch.step, latents_in(args, kwargs))
        watch.seconds += time.perf_counter() - started

    with contextlib.ExitStack() as undo:
        for module in find_denoisers(pipe).values():
            undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        check(stop)
        yield watch


def check(stop: Stop) -> None:
    """Raise Cancelled if the stop was asked for."""
    if stop.asked:
        raise Cancelled


def _plain(value: Any) -> Any:
    """A time step as a number that can be compared."""
    return float(value.flatten()[0]) if isinstance(value, Tensor) else value
