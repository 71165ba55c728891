"""Circumstances of memory: offloading by accelerate and diffusers, casting of layers, the autoencoder in parts."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from dit_accel.testing.composition.circumstance import Circumstance, Enter, Setting, both_ways

_CPU = torch.device("cpu")


def model_offload(setting: Setting) -> None:
    setting.pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(setting: Setting) -> None:
    setting.pipe.enable_sequential_cpu_offload(device="cpu")


def group_offload(**options: Any) -> Enter:
    """Groups of blocks, or leaves, of the denoisers."""

    def enter(setting: Setting) -> None:
        for denoiser in setting.denoisers:
            denoiser.enable_group_offload(onload_device=_CPU, offload_device=_CPU, **options)

    return enter


def group_offload_to_disk(setting: Setting) -> None:
    folder = setting.undo.enter_context(tempfile.TemporaryDirectory())
    group_offload(offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=folder)(setting)


def whole_pipe_offload(setting: Setting) -> None:
    setting.pipe.enable_group_offload(onload_device=_CPU, offload_device=_CPU, offload_type="leaf_level")


def layerwise_casting(setting: Setting) -> None:
    for denoiser in setting.denoisers:
        denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def vae_in_parts(setting: Setting) -> None:
    setting.pipe.vae.enable_slicing()
    setting.pipe.vae.enable_tiling()
    setting.arguments["output_type"] = "pt"


_BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}
_ELSEWHERE = "weights read from a file lie elsewhere in memory, and products differ in the last bit"
_ON_DISK = dict.fromkeys(("weights", "all"), "are offloaded to disk")
_CAST = dict.fromkeys(("weights", "all"), "layerwise casting")

CIRCUMSTANCES = (
    *both_ways("model offload", model_offload, pipelines=("flux", "sd3")),
    Circumstance("sequential offload from CPU to CPU", sequential_offload, impossible="new() received an invalid"),
    *both_ways("group offload of blocks", group_offload(**_BLOCKS)),
    *both_ways("group offload of leaves", group_offload(offload_type="leaf_level")),
    *both_ways("group offload to disk", group_offload_to_disk, rounding=1e-6, because=_ELSEWHERE, refused=_ON_DISK),
    Circumstance(
        "group offload with streams on a CPU",
        group_offload(**_BLOCKS, use_stream=True),
        impossible="Pass `use_stream=False`",
    ),
    *both_ways("group offload of the pipeline", whole_pipe_offload),
    *both_ways("layerwise casting to float8", layerwise_casting, changes=True, refused=_CAST),
    *both_ways("VAE tiling and slicing", vae_in_parts, changes=True),
)
