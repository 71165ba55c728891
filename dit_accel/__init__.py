"""dit_accel: makes diffusion transformers in Hugging Face `diffusers` faster, in one call.

    session = dit_accel.apply(pipe, "balanced")

Names are loaded on first use (PEP 562), so that importing the package, or asking for `--help`, loads no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.api import apply as apply
    from dit_accel.attention import BlockSparse as BlockSparse
    from dit_accel.attention.find_grid import register_grid as register_grid
    from dit_accel.attention.grid import TokenGrid as TokenGrid
    from dit_accel.cache import BlockCache as BlockCache
    from dit_accel.errors import CheckpointError as CheckpointError
    from dit_accel.errors import DitAccelError as DitAccelError
    from dit_accel.errors import KernelUnavailableError as KernelUnavailableError
    from dit_accel.errors import ManifestError as ManifestError
    from dit_accel.errors import NonFiniteError as NonFiniteError
    from dit_accel.errors import PolicyError as PolicyError
    from dit_accel.errors import UnsupportedModelError as UnsupportedModelError
    from dit_accel.features import FeatureExtractor as FeatureExtractor
    from dit_accel.forecast import Forecast as Forecast
    from dit_accel.policy import Policy as Policy
    from dit_accel.policy import policies as policies
    from dit_accel.quantization.config import VQConfig as VQConfig
    from dit_accel.quantization.load import load_model as load_model
    from dit_accel.resolution import Progressive as Progressive
    from dit_accel.session import Session as Session
    from dit_accel.slicing import Slicing as Slicing
    from dit_accel.slicing import slice_features as slice_features
    from dit_accel.stats import Stats as Stats
    from dit_accel.stats import StepRecord as StepRecord
    from dit_accel.weights.vector_quant import VectorQuant as VectorQuant

__version__ = "0.1.0"

_HOMES = {
    "apply": "api",
    "BlockCache": "cache",
    "BlockSparse": "attention",
    "TokenGrid": "attention.grid",
    "register_grid": "attention.find_grid",
    "CheckpointError": "errors",
    "DitAccelError": "errors",
    "KernelUnavailableError": "errors",
    "ManifestError": "errors",
    "NonFiniteError": "errors",
    "PolicyError": "errors",
    "UnsupportedModelError": "errors",
    "FeatureExtractor": "features",
    "Forecast": "forecast",
    "Policy": "policy",
    "policies": "policy",
    "VQConfig": "quantization.config",
    "load_model": "quantization.load",
    "Progressive": "resolution",
    "Session": "session",
    "Slicing": "slicing",
    "slice_features": "slicing",
    "Stats": "stats",
    "StepRecord": "stats",
    "VectorQuant": "weights.vector_quant",
}
_REGISTERING = {"apply", "load_model", "VQConfig"}  # from then on diffusers reads quantised checkpoints
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _REGISTERING:
        importlib.import_module("dit_accel.quantization.quantizer").register()
    if name in _HOMES:
        return getattr(importlib.import_module(f"dit_accel.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
