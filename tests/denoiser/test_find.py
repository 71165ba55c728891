"""Which components are denoisers and which lists hold their blocks, without class names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dit_accel.denoiser.find import find_block_lists, find_denoisers
from dit_accel.diffusers_bridge import components_of, is_pipeline, takes_timestep
from dit_accel.errors import UnsupportedModelError


def linears(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(count))


class Denoiser(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = linears(blocks)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor: ...


class Encoder(Denoiser):
    def forward(self, x: Tensor) -> Tensor: ...  # pyright: ignore[reportIncompatibleMethodOverride]


class Guide(Denoiser):
    """As a ControlNet: takes a time step, but what it gives is added to a denoiser."""

    def forward(self, x: Tensor, timestep: Tensor, controlnet_cond: Tensor) -> Tensor: ...  # pyright: ignore[reportIncompatibleMethodOverride]


class Pipe(DiffusionPipeline):
    def __init__(self, transformer: Any, transformer_2: Any, text_encoder: Any, guide: Any, scheduler: Any):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            transformer_2=transformer_2,
            text_encoder=text_encoder,
            guide=guide,
            scheduler=scheduler,
        )


class Nested(nn.Module):
    """Lists at every depth: of blocks, of one, of lists, in a list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Denoiser() for _ in range(2))
        self.inner = nn.Module()
        self.inner.refiner = linears(2)
        self.inner.deeper = nn.Module()
        self.inner.deeper.layers = linears(4)
        self.single = linears(1)
        self.stages = nn.ModuleList([linears(3)])
        self.empty = nn.ModuleList()
        self.sequence = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_lists_of_blocks_are_found_at_any_depth() -> None:
    found = find_block_lists(Nested())
    assert {path: len(blocks) for path, blocks in found.items()} == {
        "blocks": 2,
        "inner.refiner": 2,
        "inner.deeper.layers": 4,
        "stages.0": 3,
    }


@pytest.mark.parametrize(("count", "found"), [(0, []), (1, []), (2, ["blocks"]), (9, ["blocks"])])
def test_a_list_of_blocks_has_two_at_least(count: int, found: list[str]) -> None:
    assert list(find_block_lists(Denoiser(count))) == found


def test_denoisers_of_a_pipeline() -> None:
    first, second = Denoiser(), Denoiser()
    pipe = Pipe(first, second, Encoder(), Guide(), None)
    found = find_denoisers(pipe)
    assert found == {"transformer": first, "transformer_2": second}
    assert is_pipeline(pipe) and set(components_of(pipe)) >= {"text_encoder", "guide"}


def test_a_component_that_is_missing_is_no_denoiser() -> None:
    assert list(find_denoisers(Pipe(Denoiser(), None, Encoder(), None, None))) == ["transformer"]


def test_a_pipeline_without_denoisers_is_refused_with_its_modules() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Pipe has no denoiser .* \(its modules: guide, text_encoder\)"):
        find_denoisers(Pipe(None, None, Encoder(), Guide(), None))
    with pytest.raises(UnsupportedModelError, match="its modules: none"):
        find_denoisers(Pipe(None, None, None, None, None))


def test_a_bare_module_is_its_own_denoiser() -> None:
    module = Denoiser()
    assert find_denoisers(module) == {"transformer": module}
    with pytest.raises(UnsupportedModelError, match="Linear holds no list of blocks"):
        find_denoisers(nn.Linear(2, 2))


@pytest.mark.parametrize("wrong", [None, "pipe", 3, torch.zeros(2), Denoiser])
def test_anything_else_is_refused_by_its_type(wrong: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"apply\(\) got {type(wrong).__name__}"):
        find_denoisers(wrong)
    assert components_of(wrong) == {} and not is_pipeline(wrong)


@pytest.mark.parametrize(
    ("module", "takes"), [(Denoiser(), True), (Encoder(), False), (Guide(), False), (nn.ReLU(), False)]
)
def test_a_denoiser_takes_a_time_step(module: nn.Module, takes: bool) -> None:
    assert takes_timestep(module) is takes
