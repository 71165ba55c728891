"""Feature slicing: the same output with fewer activations at once, beside every mechanism, taken back in any order."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_accel
from dit_accel import BlockCache, BlockSparse, Policy, VectorQuant
from dit_accel.cache.scope import Scope
from dit_accel.denoiser.subclass import owner_of
from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.slicing import Slicing
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.checks import FORCED, traces

# Relative L2: a matrix of fewer rows may be multiplied in tiles of another shape, whose sums are rounded in another
# order. The most measured is 7e-7, in two steps of easyanimate; wan, ltx, lumina2 and cogvideox are equal bit for bit.
TOLERANCE = 1e-5
LAYERS = Policy(BlockCache(threshold=None, max_skips=1, warmup=1, tail=0, scope=Scope(unit="layers")))
POLICIES = {
    "blocks cached and forecast": FORCED,
    "layers cached": LAYERS,
    "attention sparse": Policy(attention=BlockSparse(density=0.5, block_size=16)),
    "weights quantised": Policy(weights=VectorQuant(bits=4, smallest=1024)),
}


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="slice_features")
        yield


def apart(result: Tensor, plain: Tensor) -> float:
    return float((result - plain).norm() / plain.norm())


@contextlib.contextmanager
def projected(pipe: Any) -> Iterator[list[int]]:
    """The numbers of tokens that the second projections of the feed-forward layers are given."""
    rows: list[int] = []
    layers = [module for name, module in pipe.transformer.named_modules() if name.endswith("net.2")]
    handles = [layer.register_forward_pre_hook(lambda m, given: rows.append(given[0].shape[1])) for layer in layers]
    yield rows
    for handle in handles:
        handle.remove()


def decisions(session: dit_accel.Session) -> list[tuple[str, str]]:
    return [(step.decision, step.blocks) for step in session.stats.steps]


class GatedFeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(width, 64), nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.up(tokens) * nn.functional.silu(self.gate(tokens)))


class MixingFeedForward(GatedFeedForward):
    """mix: what is done to the wide activation [B, S, C]."""

    def __init__(self, width: int, mix: Callable[[Tensor], Tensor]):
        super().__init__(width)
        self.mix = mix

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.mix(self.up(tokens)))


class TwoFeedForward(GatedFeedForward):
    def forward(self, tokens: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(tokens if other is None else tokens + other)


class Denoiser(nn.Module):
    """Blocks that are a feed-forward layer each."""

    def __init__(self, *layers: nn.Module, twice: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"ff": layer}) for layer in layers)
        self.twice = twice

    def forward(self, tokens: Tensor, timestep: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            ff = block["ff"]  # pyright: ignore[reportIndexIssue]
            tokens = tokens + (ff(tokens, tokens) if self.twice else ff(tokens))
        return tokens


def gated(width: int = 16) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(GatedFeedForward(width), GatedFeedForward(width))


# --- the same output


@pytest.mark.parametrize("name", ["flux", "sd3", "qwenimage", "lumina2", "ltx", "wan", "wan22", "easyanimate"])
def test_the_output_is_the_same_and_nothing_stays(name: str) -> None:
    tiny = tiny_pipelines.build(name)
    plain, before = tiny_pipelines.call(tiny, steps=2), traces(tiny.pipe)
    with dit_accel.slice_features(tiny.pipe, 7) as slicing:
        assert {path.split(".")[0] for path in slicing.layers} == set(tiny.denoisers)
        assert apart(tiny_pipelines.call(tiny, steps=2), plain) <= TOLERANCE
        assert slicing.layers
    assert traces(tiny.pipe) == before
    assert torch.equal(tiny_pipelines.call(tiny, steps=2), plain)
    assert slicing.layers == ()
    assert slicing.saves == "Nothing is saved: no layer is sliced."


@pytest.mark.parametrize(("count", "slices"), itertools.product((1, 2, 5, 13), (2, 3, 8)))
@torch.no_grad()
def test_any_number_of_tokens(count: int, slices: int) -> None:
    model = gated()
    tokens = torch.randn(2, count, 16)
    plain = model(tokens)
    with dit_accel.slice_features(model, slices):
        assert apart(model(tokens), plain) <= TOLERANCE


@torch.no_grad()
def test_half_precision() -> None:
    model, tokens = gated().bfloat16(), torch.randn(1, 9, 16).bfloat16()
    plain = model(tokens)
    with dit_accel.slice_features(model, 4) as slicing:
        assert apart(model(tokens).float(), plain.float()) <= 0.01  # one rounding of bfloat16 is 0.004
        assert len(slicing.layers) == 2


# --- less memory


@torch.no_grad()
def test_the_wide_activation_exists_for_a_slice_at_a_time() -> None:
    model, widest = gated(), [0]
    for layer in (inner for inner in model.modules() if isinstance(inner, nn.Linear)):
        layer.register_forward_hook(lambda m, a, result: widest.append(result.numel()))
    tokens = torch.randn(1, 96, 16)
    model(tokens)
    assert max(widest) == 96 * 64
    with dit_accel.slice_features(model, 8) as slicing:
        widest.clear()
        model(tokens)
        assert max(widest) == 96 * 64 / 8
        assert slicing.saves == (
            "2 feed-forward layers hold their inner activations, up to 64 channels wide, for 1/8 of the tokens at a "
            "time."
        )


# --- beside a session


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("slices_last", [True, False])
@pytest.mark.parametrize("removed_first", ["session", "slicing"])
def test_it_composes_in_both_orders(policy: Policy, slices_last: bool, removed_first: str) -> None:
    tiny = tiny_pipelines.build("wan", blocks=3)
    plain, before = tiny_pipelines.call(tiny), traces(tiny.pipe)
    with dit_accel.apply(tiny.pipe, policy) as session:
        expected, decided = tiny_pipelines.call(tiny), decisions(session)
    inner = None if slices_last else dit_accel.slice_features(tiny.pipe, 5)
    session = dit_accel.apply(tiny.pipe, policy)
    slicing = inner or dit_accel.slice_features(tiny.pipe, 5)
    assert apart(tiny_pipelines.call(tiny), expected) <= TOLERANCE
    assert decisions(session) == decided  # slices are no calls of a layer
    assert len(slicing.layers) == 3
    by_name: dict[str, dit_accel.Session | Slicing] = {"session": session, "slicing": slicing}
    by_name.pop(removed_first).remove()
    left = expected if removed_first == "slicing" else plain
    assert apart(tiny_pipelines.call(tiny), left) <= TOLERANCE
    by_name.popitem()[1].remove()
    assert traces(tiny.pipe) == before
    assert torch.equal(tiny_pipelines.call(tiny), plain)


def test_it_owns_layers_and_no_denoiser() -> None:
    tiny = tiny_pipelines.build("wan", blocks=2)
    slicing = dit_accel.slice_features(tiny.pipe)
    transformer = tiny.pipe.transformer  # pyright: ignore[reportAttributeAccessIssue]
    assert owner_of(transformer) is None
    assert owner_of(transformer.blocks[0].ffn) is slicing
    with dit_accel.apply(tiny.pipe, LAYERS) as session:
        assert owner_of(transformer.blocks[0].ffn) is session
        with pytest.raises(UnsupportedModelError, match="sliced already; call remove"):
            dit_accel.slice_features(transformer)
    assert type(copy.deepcopy(transformer).blocks[0].ffn) is type(transformer.blocks[0].ffn).__base__
    slicing.remove()
    slicing.remove()


# --- what is left whole, and what is refused

MIXING = {
    "neighbours": lambda wide: wide + wide.roll(1, dims=1),
    "all": lambda wide: wide - wide.mean(dim=1, keepdim=True),
    "a grid": lambda wide: wide.unflatten(1, (4, -1, 4)).flip(2).flatten(1, 3),
}


@pytest.mark.parametrize("mix", MIXING.values(), ids=MIXING)
@torch.no_grad()
def test_a_layer_that_mixes_tokens_stays_whole(mix: Callable[[Tensor], Tensor]) -> None:
    model = Denoiser(MixingFeedForward(16, mix), GatedFeedForward(16))
    tokens = torch.randn(1, 32, 16)
    plain = model(tokens)
    with dit_accel.slice_features(model, 4) as slicing:
        with pytest.warns(UserWarning, match=r"leaves transformer\.blocks\.0\.ff whole: MixingFeedForward does not"):
            assert apart(model(tokens), plain) <= TOLERANCE
        assert slicing.layers == ("transformer.blocks.1.ff",)
        model(tokens)  # warns no second time


@torch.no_grad()
def test_a_layer_of_two_tensors_stays_whole() -> None:
    model = Denoiser(TwoFeedForward(16), TwoFeedForward(16), twice=True)
    tokens = torch.randn(1, 8, 16)
    plain = model(tokens)
    with dit_accel.slice_features(model) as slicing, pytest.warns(UserWarning, match="TwoFeedForward does not"):
        assert torch.equal(model(tokens), plain)
        assert slicing.layers == ()


@torch.no_grad()
def test_a_hook_that_kept_the_sliced_forward_runs_whole_after_removal() -> None:
    model, rows = gated(), [0]
    layer, tokens = model.blocks[0]["ff"], torch.randn(1, 8, 16)  # pyright: ignore[reportIndexIssue]
    layer.up.register_forward_hook(lambda m, a, result: rows.append(result.shape[1]))
    slicing = dit_accel.slice_features(model, 4)
    kept = layer.forward
    kept(tokens)
    slicing.remove()
    kept(tokens)
    assert (rows[-2], rows[-1]) == (2, 8)


def test_training_runs_whole() -> None:
    model, rows = gated(), [0]
    first = model.blocks[0]["ff"].up  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    first.register_forward_hook(lambda m, a, result: rows.append(result.shape[1]))
    with dit_accel.slice_features(model, 4):
        model(torch.randn(1, 8, 16)).sum().backward()
        assert rows == [0, 8]
        assert first.weight.grad is not None
        model.requires_grad_(False)(torch.randn(1, 8, 16))
        assert max(rows[-4:]) == 2


@pytest.mark.parametrize("slices", [1, 0, -3, 2.0, True, "8", None])
def test_bad_slices_are_refused_in_one_sentence(slices: object) -> None:
    model = gated()
    before = traces(model)
    with pytest.raises(ArgumentError, match=r"^slices is .*; give a whole number of parts, 2 or more, such as 8\.$"):
        dit_accel.slice_features(model, slices)  # pyright: ignore[reportArgumentType]
    assert traces(model) == before


def test_blocks_without_feed_forward_layers_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to slice"):
        dit_accel.slice_features(tiny_pipelines.build("sana", blocks=2).pipe)


# --- torch.compile


def test_compiled_blocks_are_refused() -> None:
    model = gated()
    model.blocks[0].compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="Blocks of transformer are compiled"):
        dit_accel.slice_features(model)


@torch.no_grad()
def test_compiling_later_leaves_slices_outside_or_says_why_not() -> None:
    model, tokens = gated(), torch.randn(1, 8, 16)
    plain = model(tokens)
    with dit_accel.slice_features(model, 2) as slicing:
        assert apart(torch.compile(model, backend="eager")(tokens), plain) <= TOLERANCE
        assert len(slicing.layers) == 2
        torch.compiler.reset()
        with pytest.raises(RuntimeError, match=r"call Slicing\.remove\(\) first"):
            torch.compile(model, backend="eager", fullgraph=True)(tokens)
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(tokens), plain)


BLOCK_BY_BLOCK = Policy(BlockCache(threshold=None, max_skips=1, warmup=2, tail=1, scope=Scope(unit="block")))


def compile_in_place(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


@pytest.mark.parametrize(
    ("name", "order", "removed_first"),
    [
        ("wan", "apply slice compile", "slicing"),
        pytest.param("flux", "apply slice compile", "session", marks=pytest.mark.slow),
        pytest.param("flux", "slice apply compile", "slicing", marks=pytest.mark.slow),
        pytest.param("wan", "slice apply compile", "session", marks=pytest.mark.slow),
        pytest.param("wan", "slice compile apply", "session", marks=pytest.mark.slow),
        pytest.param("flux", "slice compile apply", "slicing", marks=pytest.mark.slow),
    ],
)
def test_single_blocks_are_skipped_in_a_model_compiled_whole_with_its_layers_sliced(
    name: str, order: str, removed_first: str
) -> None:
    tiny = tiny_pipelines.build(name, blocks=4)
    with projected(tiny.pipe) as whole:
        plain = tiny_pipelines.call(tiny)
    before = traces(tiny.pipe)
    with dit_accel.apply(tiny.pipe, BLOCK_BY_BLOCK) as session:
        expected, decided = tiny_pipelines.call(tiny), decisions(session)
    torch.compiler.reset()
    steps: dict[str, Callable[[], Any]] = {
        "apply": lambda: dit_accel.apply(tiny.pipe, BLOCK_BY_BLOCK),
        "slice": lambda: dit_accel.slice_features(tiny.pipe, 3),
        "compile": lambda: compile_in_place(tiny.pipe),
    }
    made = {step: steps[step]() for step in order.split()}
    session, slicing = made["apply"], made["slice"]
    with projected(tiny.pipe) as rows:
        results = [tiny_pipelines.call(tiny) for _ in range(2)]
    assert torch.equal(*results) and apart(results[0], expected) <= TOLERANCE
    assert decisions(session) == 2 * decided and any("-" in blocks and "#" in blocks for _, blocks in decided)
    assert slicing.layers and max(rows) < max(whole)
    by_name = {"session": session, "slicing": slicing}
    by_name.pop(removed_first).remove()
    assert apart(tiny_pipelines.call(tiny), expected if removed_first == "slicing" else plain) <= TOLERANCE
    by_name.popitem()[1].remove()
    assert apart(tiny_pipelines.call(tiny), plain) <= TOLERANCE
    torch.compiler.reset()
    assert [item[:1] for item in traces(tiny.pipe)] == [item[:1] for item in before]
