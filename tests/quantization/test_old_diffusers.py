"""A diffusers whose quantizers do not see the files: refused with a sentence, not loaded by halves."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
from diffusers.quantizers.base import DiffusersQuantizer

from dit_accel import VQConfig
from dit_accel.errors import UnsupportedModelError


def test_a_vq_config_is_refused(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DiffusersQuantizer, "maybe_update_state_dict", raising=False)
    with pytest.raises(UnsupportedModelError, match=r"needs diffusers 0\.39 or newer"):
        diffusers.FluxTransformer2DModel.from_pretrained(dense, quantization_config=VQConfig())
