"""The errors that dit_accel raises; each message says what was given, what is allowed and how to fix it."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class DitAccelError(Exception):
    """Base of every error raised on purpose by dit_accel."""


class PolicyError(DitAccelError, ValueError):
    """A policy, or a setting in it, is not allowed."""


class ArgumentError(DitAccelError, ValueError):
    """An argument of `compare`, `slice_features` or a pipeline call, or a prompt, is not allowed."""


class ManifestError(DitAccelError, ValueError):
    """A manifest of a batch render, or an item in it, is not allowed; the message names the line and the field."""


class UnsupportedModelError(DitAccelError, TypeError):
    """The pipeline or model cannot be accelerated by the mechanism that was asked for."""


class CheckpointError(DitAccelError, ValueError):
    """A folder of saved weights, or the config in it, cannot be used."""


class KernelUnavailableError(DitAccelError, RuntimeError):
    """A kernel was asked for by name and cannot run on this machine."""


class NonFiniteError(DitAccelError, ArithmeticError):
    """A feature stayed NaN or infinite after it was recomputed."""


def shown(value: object) -> str:
    """`repr` of a value that somebody gave, cut to what fits in a sentence."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A sentence that names the nearest allowed word, and all of them."""
    words = sorted(allowed)
    close = difflib.get_close_matches(given, words, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(words)}"
