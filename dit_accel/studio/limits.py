"""Limits: what a visitor may ask for. Checked on the server, whatever the page's own controls let through.

Each check returns the value in its own type, or raises ArgumentError: what was given, what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dit_accel.errors import ArgumentError, nearest, shown


@dataclass(frozen=True)
class Limits:
    """Caps of one request.

    steps: of denoising; guidance: scale; letters: of a prompt; times_side: of a side, over what the pipeline makes by
    itself; times_frames: the same of frames; times_work: of height * width * frames * steps over that of 50 steps at
    the pipeline's own size; policy_letters: of a policy's JSON; items: of a prompt list; list_bytes: of its file.
    """

    steps: int = 200
    seed: int = 2**53 - 1  # the largest that a browser holds exactly
    guidance: float = 30.0
    letters: int = 500
    times_side: int = 4
    times_frames: int = 2
    times_work: int = 8
    policy_letters: int = 65_536
    items: int = 200
    list_bytes: int = 1 << 20


def whole(name: str, value: Any, low: int, high: int, multiple: int = 1) -> int:
    """A whole number from `low` to `high` in steps of `multiple`; 50.0 passes for 50, as browsers send either."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value != int(value) or not low <= value <= high or int(value) % multiple:
        steps = f" in steps of {multiple}" if multiple > 1 else ""
        raise ArgumentError(f"{name} is {shown(value)}; give a whole number from {low} to {high}{steps}.")
    return int(value)


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number from `low` to `high`."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not low <= value <= high:  # not so for NaN
        raise ArgumentError(f"{name} is {shown(value)}; give a number from {low:g} to {high:g}.")
    return float(value)


def text(name: str, value: Any, letters: int) -> str:
    """Text of one line; what it says is never taken for markup, a path or a command."""
    if not isinstance(value, str):
        raise ArgumentError(f"{name} is {shown(value)} ({type(value).__name__}); give text.")
    if len(value) > letters:
        raise ArgumentError(f"{name} has {len(value)} characters; give at most {letters}.")
    if any(letter < " " or "\ud800" <= letter <= "\udfff" or letter == "\x7f" for letter in value):
        raise ArgumentError(f"{name} holds a control character or a line break; give one line of plain text.")
    return value.strip()


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """One of the allowed words."""
    words = list(allowed)
    if not isinstance(value, str) or value not in words:
        given = value if isinstance(value, str) else repr(value)
        raise ArgumentError(f"{name} is {shown(value)}; {nearest(given[:100], words)}.")
    return value
