"""load_model: a model of diffusers from its folder, its files checked first."""

from __future__ import annotations

import os
from typing import Any

from dit_accel.diffusers_bridge import class_named
from dit_accel.errors import CheckpointError
from dit_accel.quantization.checkpoint import check_headers, folder_of
from dit_accel.quantization.quantizer import register


def load_model(path: str | os.PathLike[str], *, variant: str | None = None, **arguments: Any) -> Any:
    """A model of diffusers, quantised or dense, in evaluation mode; from safetensors only.

    path: the folder of a model, or of a pipeline, whose transformer is taken. variant: a word in the files' names.
    arguments: as of diffusers' `from_pretrained`: torch_dtype, device_map, quantization_config (a VQConfig quantises a
    dense model while it is loaded). Without a dtype the model is float32, whatever the files hold, as in diffusers.

    Raises CheckpointError where a file is not what it claims to be; before any memory is set aside for tensors, where
    the headers tell.
    """
    register()
    found = check_headers(folder_of(path), variant=variant)
    kind = class_named(found.class_name)
    if kind is None:
        raise CheckpointError(
            f"{found.folder / 'config.json'} is of {found.class_name!r}, and diffusers has no such model; "
            "give the folder of a model that diffusers can load."
        )
    return kind.from_pretrained(found.folder, variant=variant, use_safetensors=True, local_files_only=True, **arguments)
