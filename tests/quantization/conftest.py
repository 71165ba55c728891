"""Tiny Flux transformers, dense and quantised, saved once; a test that changes a folder gets a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
from diffusers.quantizers.base import DiffusersQuantizer

from dit_accel import VQConfig
from dit_accel.testing.tiny_transformers import build

# diffusers 0.38 loads no VQConfig (test_old_diffusers.py): all that is left there is quantising in memory
collect_ignore_glob = [] if hasattr(DiffusersQuantizer, "maybe_update_state_dict") else ["test_vq_*.py"]

FLUX = "FluxTransformer2DModel"


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Flux transformer, float32."""
    folder = tmp_path_factory.mktemp("saved") / "dense"
    build(FLUX, blocks=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared(dense: Path) -> Path:
    """The same with universal codebooks, which layers share."""
    return _quantised(dense, "shared", VQConfig(smallest=0))


@pytest.fixture(scope="session")
def own(dense: Path) -> Path:
    """The same with codebooks of the layers' own: 60 codewords, so codes of 6 bits may be out of range, two of which
    leave 4 bits of a row's last byte; and with low-rank parts."""
    config = VQConfig(
        smallest=0, codebook="layer", size="60x16", low_rank=2, keep_first=1, modules_to_not_convert=["to_", "add_"]
    )
    return _quantised(dense, "own", config)


def _quantised(dense: Path, name: str, config: VQConfig) -> Path:
    folder = dense.parent / name
    model = diffusers.FluxTransformer2DModel.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder, to be changed."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / folder.name))
