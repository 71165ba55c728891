"""Circumstances of the objects: saved, copied, pickled, moved, shared, exchanged. What is copied has to be plain."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from dit_accel.denoiser.subclass import owner_of
from dit_accel.testing.composition.circumstance import Circumstance, Enter, Setting


def _absent(pipe: Any) -> dict[str, None]:
    """The parts that a tiny pipeline lacks, which diffusers wants to be told."""
    return {name: None for name, part in pipe.components.items() if part is None}


def saved(setting: Setting) -> None:
    """What is saved loads again."""
    folder = setting.undo.enter_context(tempfile.TemporaryDirectory())
    setting.call()
    setting.pipe.save_pretrained(folder)
    loaded: Any = type(setting.pipe).from_pretrained(folder, **_absent(setting.pipe))
    assert "dit_accel" not in repr(type(loaded.transformer))


def _from_pipe(setting: Setting) -> Any:
    """What `from_pipe` of the plain class makes of the pipeline, which may be wrapped."""
    return getattr(diffusers, type(setting.pipe).__name__).from_pipe(setting.pipe, **_absent(setting.pipe))


def from_pipe(setting: Setting) -> None:
    """Another pipeline takes over the components, the wrapped denoiser too; the session stays with the first."""
    setting.call()
    other = _from_pipe(setting)
    assert all(getattr(other, name) is getattr(setting.pipe, name) for name in setting.tiny.denoisers)


def included(make: Callable[[Setting], Any]) -> Enter:
    """The session accelerates the other pipeline too, and that is the one which is called."""

    def enter(setting: Setting) -> None:
        setting.call()
        other, session = make(setting), owner_of(setting.pipe)
        if session is not None:
            session.include(other)
        setting.tiny = dataclasses.replace(setting.tiny, pipe=other)

    return enter


def _of_the_same_parts(setting: Setting) -> Any:
    return getattr(diffusers, type(setting.pipe).__name__)(**setting.pipe.components)


def copied(setting: Setting) -> None:
    """A deep copy is plain, and owns its weights."""
    setting.call()
    twin = copy.deepcopy(setting.pipe)
    with torch.no_grad():
        next(twin.transformer.parameters()).zero_()


def pickled(setting: Setting) -> None:
    """What pickle asks of the denoiser names its plain class (pickles themselves: tests/test_faults.py)."""
    setting.call()
    make, arguments, *_ = setting.pipe.transformer.__reduce_ex__(4)
    wrapped = [kind for kind in (make, *arguments) if isinstance(kind, type) and hasattr(kind, "_dit_accel_owner")]
    assert not wrapped


def moved(setting: Setting) -> None:
    """To where it is, and a part of it to another dtype and back."""
    setting.call()
    setting.pipe.to("cpu")
    setting.pipe.vae.to(torch.float64).to(torch.float32)


def vae_exchanged(setting: Setting) -> None:
    setting.call()
    setting.pipe.vae = copy.deepcopy(setting.pipe.vae)


def scheduler_exchanged(setting: Setting) -> None:
    setting.call()
    setting.pipe.scheduler = type(setting.pipe.scheduler).from_config(setting.pipe.scheduler.config)


def shared(setting: Setting) -> None:
    """A second pipeline holds the same denoiser and is called in between: there it is plain."""
    setting.call()
    type(setting.pipe)(**setting.pipe.components)


def interrupted(setting: Setting) -> None:
    """A call that ends with an error leaves nothing behind."""

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    try:
        setting.arguments["callback_on_step_end"] = stop
        setting.call()
    except KeyboardInterrupt:
        del setting.arguments["callback_on_step_end"]


# says diffusers, whose from_pipe casts what it takes over
_CAST = dict.fromkeys(("weights", "all"), "Casting a quantized model to a new `dtype` is unsupported")

_SHARED = ("dit", "flux", "wan")

CIRCUMSTANCES = (
    *(
        Circumstance(f"apply, then {name}", enter, after=True)
        for name, enter in {
            "save_pretrained": saved,
            "deepcopy": copied,
            "pickle": pickled,
            "moving it": moved,
            "another VAE": vae_exchanged,
            "another scheduler": scheduler_exchanged,
            "the denoiser in a second pipeline": shared,
            "an interrupted call": interrupted,
        }.items()
    ),
    Circumstance("apply, then from_pipe", from_pipe, _SHARED, after=True, refused=_CAST),
    Circumstance(
        "apply, then from_pipe, and session.include", included(_from_pipe), _SHARED, after=True, refused=_CAST
    ),
    Circumstance(
        "apply, then a second pipeline, and session.include", included(_of_the_same_parts), _SHARED, after=True
    ),
)
