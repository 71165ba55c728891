"""Machine: what a kernel benchmark was measured on and with, for its record."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def cpu_name() -> str:
    """The processor in words, with its widest vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}"


def record(seconds: float, clock: str) -> dict[str, Any]:
    """All that is needed to judge or repeat the rows of a run. seconds: that it took; clock: what its times are of."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "load_average": os.getloadavg(),
        "seconds": round(seconds),
        "clock": clock,
    }
