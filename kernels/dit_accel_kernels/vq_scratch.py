"""Memory that calls of vq_linear share: kept between them, since the system takes long to hand out fresh pages.

One buffer for each Python thread, device and, on CUDA, stream: two calls at once never meet in it. What it holds at the
start of a call is never read.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(device: torch.device, size: int) -> Tensor:
    """uint8 [size] on `device`, with anything in it; the same memory at the next call of this thread."""
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = buffers()
    if key not in held or held[key].shape[0] < size:
        held.pop(key, None)  # let go before the larger one is made
        with torch.inference_mode(False):  # it also serves calls outside inference mode
            held[key] = torch.empty(size, dtype=torch.uint8, device=device)
    return held[key][:size]


def buffers() -> dict[tuple[torch.device, int], Tensor]:
    """This thread's buffers, by device and stream."""
    return _kept.__dict__.setdefault("buffers", {})


def release() -> None:
    """Let go of this thread's buffers."""
    buffers().clear()
