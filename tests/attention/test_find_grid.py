"""Where the tokens of an attention call lie: found from the call's arguments, checked against what the model does."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dit_accel.attention.find_grid import grid_for, register_grid
from dit_accel.attention.grid import TokenGrid
from dit_accel.denoiser.arguments import named_arguments
from dit_accel.testing import tiny_pipelines

# Joint attention over text and image; the grid in tokens is that of the tiny pipelines.
JOINT = {
    "flux": True,
    "flux2": True,
    "chroma": True,
    "qwenimage": True,
    "cogvideox": True,
    "cogview4": True,
    "auraflow": True,
    "sd3": False,
    "hunyuan_video": False,
    "mochi": False,
}
IMAGE_ONLY = ("wan", "ltx", "dit", "pixart_sigma")


class _Values(TorchFunctionMode):
    """Keeps the values of every self-attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            query, key, value = (args + tuple(kwargs[n] for n in ("query", "key", "value") if n in kwargs))[:3]
            if query.shape[2] == key.shape[2]:
                self.seen.append(value.clone())
        return func(*args, **kwargs)


def first_call(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser of a tiny pipeline, and the arguments of its first call."""
    tiny = tiny_pipelines.build(name)
    module = getattr(tiny.pipe, tiny.denoisers[0])
    calls: list[tuple[Any, Any]] = []
    handle = module.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    tiny_pipelines.call(tiny, 2)
    handle.remove()
    return module, named_arguments(module, *calls[0])


def values(module: nn.Module, arguments: Mapping[str, Any]) -> list[Tensor]:
    with _Values() as mode, torch.no_grad():
        module(**arguments)
    return mode.seen


@pytest.mark.parametrize("name", JOINT)
def test_the_text_stands_where_the_grid_says(name: str) -> None:
    module, arguments = first_call(name)
    plain = values(module, arguments)
    latents = arguments["hidden_states"]
    moved = values(module, {**arguments, "hidden_states": latents + torch.randn_like(latents)})
    grids = [grid_for(type(module).__name__, module.config, arguments, value.shape[2]) for value in plain]
    joint = next(i for i, grid in enumerate(grids) if grid is not None and grid.text_length)
    grid = grids[joint]
    assert grid is not None and grid.text_first is JOINT[name] and grid.tokens == plain[joint].shape[2]
    changed = (plain[joint] != moved[joint]).flatten(0, 1).any(0).any(-1)
    start = 0 if grid.text_first else grid.image_tokens
    is_text = torch.zeros(grid.tokens, dtype=torch.bool)
    is_text[start : start + grid.text_length] = True
    assert torch.equal(changed, ~is_text), "before it has seen the image, the text does not move with it"


@pytest.mark.parametrize("name", IMAGE_ONLY)
def test_self_attention_of_the_image_has_no_text(name: str) -> None:
    module, arguments = first_call(name)
    for value in values(module, arguments):
        grid = grid_for(type(module).__name__, module.config, arguments, value.shape[2])
        assert grid is None or (grid.text_length == 0 and grid.tokens == value.shape[2])
    longest = max(value.shape[2] for value in values(module, arguments))
    assert grid_for(type(module).__name__, module.config, arguments, longest) is not None


@pytest.fixture
def registered() -> Iterator[None]:
    undo = register_grid("Model", lambda arguments, tokens: TokenGrid(1, 2, 3, 4) if tokens < 99 else None)
    yield
    undo()


def test_a_registered_rule_is_asked_first_and_checked(registered: None) -> None:
    del registered
    latents = {"hidden_states": torch.zeros(1, 4, 2, 5)}
    assert grid_for("Model", {}, latents, 10) == TokenGrid(1, 2, 3, 4)
    assert grid_for("Model", {}, latents, 100) is None
    with pytest.raises(ValueError, match="registered for Model has 10 tokens, but its attention has 12"):
        grid_for("Model", {}, latents, 12)


def test_taking_a_rule_back_leaves_the_one_before() -> None:
    outer = register_grid("Other", lambda arguments, tokens: TokenGrid(1, 1, tokens))
    inner = register_grid("Other", lambda arguments, tokens: None)
    assert grid_for("Other", {}, {}, 7) is None
    inner()
    assert grid_for("Other", {}, {}, 7) == TokenGrid(1, 1, 7)
    outer()
    assert grid_for("Other", {}, {}, 7) is None


@pytest.mark.parametrize(
    ("arguments", "config", "tokens", "expected"),
    [
        ({"hidden_states": torch.zeros(1, 4, 6, 8)}, {"patch_size": 2, "in_channels": 4}, 12, (1, 3, 4)),
        ({"hidden_states": torch.zeros(1, 4, 3, 6, 8)}, {"patch_size": [1, 2, 2], "in_channels": 4}, 36, (3, 3, 4)),
        ({"hidden_states": torch.zeros(1, 3, 4, 6, 8)}, {"patch_size": 2, "in_channels": 4}, 36, (3, 3, 4)),
        ({"hidden_states": torch.zeros(1, 4, 6, 8)}, {"patch_size": 2, "in_channels": 4}, 13, None),
        ({"hidden_states": torch.zeros(1, 30, 8), "num_frames": 2, "height": 3, "width": 5}, {}, 30, (2, 3, 5)),
        ({"img_shapes": [[(1, 4, 5)]]}, {}, 20, (1, 4, 5)),
        ({"hidden_states": torch.zeros(1, 30, 8)}, {}, 30, None),
    ],
)
def test_grids_of_arguments(arguments: Any, config: Any, tokens: int, expected: Any) -> None:
    grid = grid_for("Unknown", config, arguments, tokens)
    assert grid == (None if expected is None else TokenGrid(*expected))


def test_a_remainder_that_is_no_text_has_no_grid() -> None:
    latents = {"hidden_states": torch.zeros(1, 4, 4, 4), "encoder_hidden_states": torch.zeros(1, 5, 8)}
    assert grid_for("FluxTransformer2DModel", {"in_channels": 4}, latents, 21) == TokenGrid(1, 4, 4, 5, True)
    assert grid_for("FluxTransformer2DModel", {"in_channels": 4}, latents, 32) is None, "16 more are another picture"
    assert grid_for("Unheard", {"in_channels": 4}, latents, 21) is None, "nobody knows where its text stands"
