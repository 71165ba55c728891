"""Devices: where a pipeline runs, by name, or the first accelerator of this machine."""

from __future__ import annotations

import os
from typing import Any

import torch

from dit_accel.errors import ArgumentError


def pick(name: str = "auto") -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1", "mps"; "auto" is the first accelerator, or the one of this rank.

    Raises ArgumentError where there is none of that name here.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)  # torch itself says whether it can be used
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = " ".join(str(error).split()).split(". ")[0]
        raise ArgumentError(f"The device {name!r} cannot be used here ({said[:120]}); give auto or cpu.") from None
    return device


def put(pipe: Any, device: torch.device) -> Any:
    """The pipeline on a device that `pick` gave."""
    return pipe if device.type == "cpu" else pipe.to(device)
