"""The way into a model's attention: every call is seen, taken or left with a reason, and given back."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator

import pytest
import torch
from diffusers import SD3Transformer2DModel, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import dit_accel
from dit_accel import (
    BlockCache,
    BlockSparse,
    Forecast,
    KernelUnavailableError,
    NonFiniteError,
    Policy,
    PolicyError,
    UnsupportedModelError,
)
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.route import AttentionCall, added, attention_layers, key_bias, text_bias
from dit_accel.cache import Schedule
from dit_accel.denoiser.flops import attention_flops
from dit_accel.resolution import Progressive
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.tiny_pipelines import TinyPipeline

STEPS = 6
ONE_BLOCK = ("dit",)  # so few tokens that every block is kept
SPARSE = BlockSparse(density=0.3, block_size=16, min_tokens=0, dense_steps=0.0)
DENSE = BlockSparse(density=0.3, min_tokens=10**6, dense_steps=0.0)
PIPELINES = (
    *("flux", "flux_true_cfg", "sd3", "qwenimage", "auraflow", "pixart_sigma", "dit", "cogview4", "wan"),
    *("wan22", "ltx", "hunyuan_video", "cogvideox", "mochi"),
)


@functools.lru_cache(maxsize=2)
def built(name: str) -> tuple[TinyPipeline, Tensor]:
    """A tiny pipeline, and what it gives; pictures of some are enlarged, to hold more than two blocks of tokens."""
    tiny = tiny_pipelines.build(name)
    if name in ("mochi", "hunyuan_video"):
        size = {side: 2 * tiny.arguments[side] for side in ("height", "width")}
        tiny = dataclasses.replace(tiny, arguments=tiny.arguments | size)
    return tiny, tiny_pipelines.call(tiny, STEPS)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", PIPELINES)
def test_attention_is_seen_left_alone_made_sparse_and_given_back(name: str) -> None:
    tiny, plain = built(name)
    with dit_accel.apply(tiny.pipe, Policy(attention=DENSE)) as session:
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain), "seen and passed through"
        layers = session.stats.attention
        known = {layer.name for one in session.denoisers.values() for layer in one.attention}
        assert set(layers) == known
        assert all(layer.seen and not layer.sparse for layer in layers.values())
        assert session.stats.attention_density == 1.0 and session.stats.flops_share == 1.0
    with dit_accel.apply(tiny.pipe, Policy(attention=SPARSE)) as session:
        first, second = (tiny_pipelines.call(tiny, STEPS) for _ in range(2))
        stats = session.stats
        assert torch.equal(first, second) and bool(torch.isfinite(first).all())
        assert torch.equal(first, plain) == (name in ONE_BLOCK) and stats.sparse_calls > 0
        assert (stats.attention_density < 1 and stats.flops_share < 1) or name in ONE_BLOCK
        assert stats.compute_share == 1
        assert "sparse, at" in session.report() and "Nothing was skipped" not in session.report()
    assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)
    assert all(type(module).__call__ is nn.Module.__call__ for layer in layers_of(tiny) for module in [layer])


def layers_of(tiny: TinyPipeline) -> list[nn.Module]:
    return [module for name in tiny.denoisers for module in getattr(tiny.pipe, name).modules()]


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("wan", SPARSE, "cross-attention"),
        ("flux", dataclasses.replace(SPARSE, dense_steps=0.5), "first steps"),
        (
            "flux",
            BlockSparse(density=0.3, block_size=16, min_tokens=0, dense_steps=0.0, dense_layers=0.5),
            "first layers",
        ),
        ("flux", DENSE, "short sequence"),
        ("chroma", SPARSE, "full mask"),
    ],
)
def test_what_stays_dense_is_counted_with_its_reason(name: str, settings: BlockSparse, reason: str) -> None:
    tiny, _ = built(name)
    with dit_accel.apply(tiny.pipe, Policy(attention=settings)) as session:
        tiny_pipelines.call(tiny, STEPS)
        counts = [layer.dense[reason] for layer in session.stats.attention.values()]
        assert f"x dense: {reason}" in session.report()
    steps = {"first steps": 3}.get(reason, STEPS)
    branches = sum(record.step == 0 for record in session.stats.steps)
    assert set(counts) <= {0, steps * branches} and any(counts)
    if reason == "first layers":
        assert [count > 0 for count in counts] == [place < len(counts) / 2 for place in range(len(counts))]
    if reason == "short sequence":
        assert "all attention stayed dense (short sequence)" in session.report()


def test_the_first_steps_are_those_of_the_plain_pipeline() -> None:
    tiny, _ = built("flux")
    seen: list[list[Tensor]] = []

    def watched(policy: Policy) -> None:
        latents: list[Tensor] = []
        with dit_accel.apply(tiny.pipe, policy):
            tiny.pipe(
                **tiny.arguments,
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(0),
                callback_on_step_end=lambda pipe, i, t, kwargs: latents.append(kwargs["latents"].clone()) or {},
            )
        seen.append(latents)

    watched(Policy())
    watched(Policy(attention=BlockSparse(density=0.3, block_size=16, min_tokens=0, dense_steps=0.5)))
    same = [torch.equal(one, other) for one, other in zip(*seen)]
    assert same == [True] * 3 + [False] * 3


def test_the_share_of_the_work_is_that_of_the_kept_blocks() -> None:
    tiny, _ = built("flux")
    with dit_accel.apply(tiny.pipe, Policy(attention=SPARSE)) as session:
        tiny_pipelines.call(tiny, STEPS)
        record, meter = session.stats.steps[0], session.denoisers["transformer"].meter
    (total, _), layers = next(iter(meter.tables.values())), session.stats.attention.values()
    module = tiny.pipe.transformer
    queries = torch.empty(1, tiny_pipelines.HEADS, text_and_image(tiny), tiny_pipelines.HEAD_DIM)
    dense = len(layers) * attention_flops(queries, queries, queries)
    with dit_accel.apply(module, Policy()):
        assert record.flops_total == total
    assert record.flops == total - round(dense * (1 - record.attention_density))
    assert session.stats.attention_density == pytest.approx(sum(layer.density for layer in layers) / len(layers))


def text_and_image(tiny: TinyPipeline) -> int:
    shapes: list[int] = []
    attention = next(m for m in tiny.pipe.transformer.modules() if hasattr(m, "to_q"))
    handle = attention.register_forward_pre_hook(
        lambda m, a, k: shapes.append(
            sum(k[n].shape[1] for n in ("hidden_states", "encoder_hidden_states") if k.get(n) is not None)
        ),
        with_kwargs=True,
    )
    tiny_pipelines.call(tiny, 1)
    handle.remove()
    return shapes[0]


@pytest.mark.parametrize("scope", ["fora", "fbcache", "taylorseer-lite"])
def test_a_skipped_block_or_layer_costs_no_search(scope: str) -> None:
    tiny, plain = built("flux")
    named = Policy.named(scope, **({"threshold": 1e9} if scope == "fbcache" else {}))
    with dit_accel.apply(tiny.pipe, Policy(named.cache, named.forecast, attention=SPARSE)) as session:
        result = tiny_pipelines.call(tiny, 12)
        stats = session.stats
        assert torch.equal(result, tiny_pipelines.call(tiny, 12))
    layers = len(stats.attention)
    first = stats.attention["transformer.transformer_blocks.0.attn"].seen
    assert first < 2 * 12 if scope != "fbcache" else first == 2 * 12, "the probe block runs at every step"
    assert min(layer.seen for layer in stats.attention.values()) < 2 * 12 and layers > 1
    skipped = [step for step in stats.steps if step.decision != "compute"]
    assert skipped and all(step.flops < step.flops_total for step in skipped)
    assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)


BATCHED = {
    "schedule": Policy(attention=SPARSE),
    "gate": Policy(BlockCache(0.05, probe_blocks=1), Forecast("newton", order=1), attention=SPARSE),
    "whole": Policy.named("balanced", attention=SPARSE, warmup=2, threshold=0.05),
}


@pytest.mark.parametrize("policy", BATCHED.values(), ids=BATCHED)
def test_a_sample_does_not_depend_on_its_batch_mates(policy: Policy) -> None:
    tiny, _ = built("sd3")

    def images(seeds: list[int]) -> Tensor:
        arguments = {
            name: value.expand(len(seeds), *value.shape[1:]) if isinstance(value, Tensor) else value
            for name, value in tiny.arguments.items()
        }
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return tiny.pipe(**arguments, num_inference_steps=12, generator=generators).images

    with dit_accel.apply(tiny.pipe, policy) as session:
        together = images([1, 2, 3])
        assert session.stats.sparse_calls
        for place, seed in enumerate([1, 2, 3]):
            assert relative(together[place], images([seed])[0]) < 1e-6  # batched products round otherwise


def test_indices_are_used_again_until_the_next_search(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.attention import route

    tiny, _ = built("flux")
    searched: list[bool] = []
    plain = route.attend

    def noted(*args: object, **kwargs: object) -> object:
        result = plain(*args, **kwargs)  # type: ignore[arg-type]
        searched.append(result.searched)
        return result

    monkeypatch.setattr(route, "attend", noted)
    often = BlockSparse(density=0.3, block_size=16, min_tokens=0, dense_steps=0.0, search_every=3)
    with dit_accel.apply(tiny.pipe, Policy(attention=often)) as session:
        for _ in range(2):
            searched.clear()
            tiny_pipelines.call(tiny, STEPS)
            layers = len(session.stats.attention)
            by_step = [all(searched[s * layers : (s + 1) * layers]) for s in range(STEPS)]
            assert by_step == [True, False, False, True, False, False], "and every run begins anew"
            assert sum(searched) == 2 * layers
        assert session.stats.state_bytes > 0


# ------------------------------------------------------------------------------------------ what is refused


def test_a_model_without_softmax_attention_is_refused_or_named() -> None:
    tiny, plain = built("sana")
    policy = Policy(attention=BlockSparse(density=0.3, min_tokens=0))
    with dit_accel.apply(tiny.pipe, policy, strict=False) as session:
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)
        assert session.stats.sparse_calls == 0


class LinearBlock(nn.Module):
    """A block that mixes tokens without softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mix(hidden_states.mean(1, keepdim=True))


class SoftmaxBlock(LinearBlock):
    """One that calls torch's attention itself, without an attention module."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        heads = self.mix(hidden_states).unflatten(-1, (2, 4)).transpose(1, 2)
        return hidden_states + scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(3)])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        del timestep
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@pytest.fixture
def grid() -> Iterator[None]:
    undo = dit_accel.register_grid("Model", lambda arguments, tokens: dit_accel.TokenGrid(1, 8, tokens // 8))
    with contextlib.ExitStack() as stack:
        stack.callback(undo)
        yield


def steps(model: nn.Module, session: dit_accel.Session, tokens: int = 64, count: int = 3) -> Tensor:
    x = torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(0))
    with session.run(steps=count), torch.no_grad():
        for step in range(count):
            x = model(x, torch.tensor(float(count - step)))
    return x


def test_blocks_without_attention_are_an_error_that_says_so(grid: None) -> None:
    del grid
    model = Model(LinearBlock)
    sentence = r"No softmax attention was seen in the blocks of transformer"
    session = dit_accel.apply(model, Policy(attention=SPARSE))
    with session, pytest.raises(UnsupportedModelError, match=sentence):
        steps(model, session)
    with dit_accel.apply(model, Policy(attention=SPARSE), strict=False) as session:
        steps(model, session)
        assert any("No softmax attention" in warning for warning in session.stats.warnings)


def test_a_block_that_attends_by_itself_is_its_own_layer(grid: None) -> None:
    del grid
    model = Model(SoftmaxBlock)
    assert [layer.name for layer in attention_layers(dict(model.named_children()))] == ["blocks"]
    with dit_accel.apply(model, Policy(attention=SPARSE)) as session:
        steps(model, session)
        assert {name: layer.sparse for name, layer in session.stats.attention.items()} == {
            f"transformer.blocks.{number}": 3 for number in range(3)
        }


def test_an_unknown_grid_stays_dense_and_says_so() -> None:
    model = Model(SoftmaxBlock)
    with dit_accel.apply(model, Policy(attention=SPARSE)) as session:
        sparse = steps(model, session)
        assert session.stats.attention["transformer.blocks.0"].dense == {"unknown token grid": 3}
    with dit_accel.apply(model, Policy()) as session:
        assert torch.equal(steps(model, session), sparse)


def test_nan_names_layer_and_step(grid: None) -> None:
    del grid
    model = Model(SoftmaxBlock)
    with torch.no_grad():
        model.blocks[1].mix.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
    session = dit_accel.apply(model, Policy(attention=SPARSE))
    with session, pytest.raises(NonFiniteError, match=r"transformer\.blocks\.1 at step 0"):
        steps(model, session)


def test_another_attention_backend_is_an_error_that_says_how_to_leave_it() -> None:
    from diffusers import attention_backend

    tiny, plain = built("flux")
    with attention_backend("native"):  # what is set on a model stays in force for all of them, even after its reset
        tiny.pipe.transformer.set_attention_backend("flex")
        with pytest.raises(UnsupportedModelError, match=r"backend 'flex' is set; call reset_attention_backend\(\)"):
            dit_accel.apply(tiny.pipe, Policy(attention=SPARSE))
        dit_accel.apply(tiny.pipe, Policy()).remove()
        tiny.pipe.transformer.reset_attention_backend()
        with pytest.raises(UnsupportedModelError, match=r"'flex' is in force; call set_attention_backend\('native'\)"):
            dit_accel.apply(tiny.pipe, Policy(attention=SPARSE))
        tiny.pipe.transformer.set_attention_backend("_native_math")
        with dit_accel.apply(tiny.pipe, Policy(attention=SPARSE)) as session:
            tiny_pipelines.call(tiny, STEPS)
            assert session.stats.sparse_calls, "torch's own kernels all go through the same call"
        tiny.pipe.transformer.reset_attention_backend()
    assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)


@pytest.mark.parametrize("whole", [False, True], ids=["graph breaks allowed", "whole graphs"])
def test_compiled_blocks(whole: bool) -> None:
    tiny = tiny_pipelines.build("flux")
    plain = tiny_pipelines.call(tiny, STEPS)
    with dit_accel.apply(tiny.pipe, Policy(attention=SPARSE)) as session:
        sparse = tiny_pipelines.call(tiny, STEPS)
        for block in [*tiny.pipe.transformer.transformer_blocks, *tiny.pipe.transformer.single_transformer_blocks]:
            block.compile(backend="eager", fullgraph=whole)
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), sparse)
        assert session.stats.sparse_calls and relative(sparse, plain) > 1e-4
    assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)


# ------------------------------------------------------------------------------------------ single parts


def test_masks_of_keys_are_told_from_others() -> None:
    query = torch.randn(2, 3, 8, 4)

    def of(mask: Tensor | None) -> tuple[Tensor | None, str | None]:
        return key_bias(AttentionCall(query, query, query, mask))

    assert of(None) == (None, None)
    keys = torch.rand(2, 1, 1, 8) > 0.5
    bias, reason = of(keys)
    assert reason is None and bias is not None and torch.equal(bias, keys[:, :, 0])
    assert of(torch.zeros(2, 3, 8, 8)) == (None, "full mask")
    assert of(torch.zeros(8, 8)) == (None, "full mask")


@pytest.mark.parametrize("model", [SD3Transformer2DModel, WanTransformer3DModel])
def test_layers_are_in_their_order_and_none_is_inside_another(model: type) -> None:
    tiny = tiny_pipelines.build("sd3" if model is SD3Transformer2DModel else "wan")
    module = tiny.pipe.transformer
    blocks = {name: child for name, child in module.named_modules() if isinstance(child, nn.ModuleList)}
    first = next(iter(blocks))
    layers = attention_layers({f"{first}.{i}": block for i, block in enumerate(blocks[first])})
    names = [layer.name for layer in layers]
    assert len(set(names)) == len(names) == len(blocks[first]) * (1 if model is SD3Transformer2DModel else 2)
    assert [layer.depth for layer in layers] == sorted(layer.depth for layer in layers)
    assert not any(one != other and other.startswith(one + ".") for one in names for other in names)


def test_settings_of_attention_reach_a_named_policy() -> None:
    policy = Policy.named("balanced", attention=SPARSE)
    assert policy.attention == SPARSE and policy.skips and policy.is_sparse
    assert Policy.from_dict(policy.to_dict()) == policy
    exact = Policy(attention=BlockSparse(density=1.0))
    assert exact.is_exact and not exact.is_sparse
    with pytest.raises(PolicyError, match="did you mean 'density'"):
        Policy.named("balanced", attention={"densty": 0.5})
    assert Policy(BlockCache(schedule=Schedule()), attention=SPARSE).cache is not None


def test_the_kernel_with_every_block_gives_what_dense_attention_gives() -> None:
    """One step, since later ones enlarge any rounding: 1e-6 is what two orders of summation differ by in float32."""
    tiny, _ = built("flux")
    plain = tiny_pipelines.call(tiny, 1)
    every = dataclasses.replace(SPARSE, threshold=0.0, impl="cpu")
    with dit_accel.apply(tiny.pipe, Policy(attention=every)) as session:
        whole = tiny_pipelines.call(tiny, 1)
        assert session.stats.sparse_calls and all(layer.density >= 1 for layer in session.stats.attention.values())
    assert not torch.equal(whole, plain), "it went through the kernel"
    assert relative(whole, plain) < 1e-6


# ---------------------------------------------------------------------------------------------- machines without kernel


def test_without_a_compiler_attention_stays_dense_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel_kernels.cpu.unavailable", lambda query: "there is no C++ compiler")
    tiny, plain = built("flux")
    with dit_accel.apply(tiny.pipe, Policy(attention=dataclasses.replace(SPARSE, density=0.6))) as session:
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)
        assert "x dense: no kernel that beats it" in session.report()
    few = dataclasses.replace(SPARSE, density=0.1)
    with dit_accel.apply(tiny.pipe, Policy(attention=few)) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text keeps the tiny grid dense, which is said once
        assert not torch.equal(tiny_pipelines.call(tiny, STEPS), plain) and session.stats.sparse_calls
        assert session.stats.attention_density > 0
    named = dataclasses.replace(SPARSE, impl="cpu")
    session = dit_accel.apply(tiny.pipe, Policy(attention=named))
    with session, pytest.raises(KernelUnavailableError, match=r"BlockSparse.impl='cpu' cannot run here: there is no C"):
        tiny_pipelines.call(tiny, STEPS)


# -------------------------------------------------------------------------------------------- more weight for the text


@pytest.mark.parametrize(("name", "moves"), [("flux", True), ("sd3", True), ("hunyuan_video", True), ("wan", False)])
@pytest.mark.parametrize("attention", [None, SPARSE], ids=["dense", "sparse"])
def test_stages_of_lower_resolution_attend_more_to_the_text(
    name: str, moves: bool, attention: BlockSparse | None
) -> None:
    tiny, plain = built(name)
    size = {side: 2 * tiny.arguments[side] for side in ("height", "width")}
    tiny = dataclasses.replace(tiny, arguments=tiny.arguments | size)
    results = []
    for bias in (0.0, 5.0):
        staged = Progressive((0.5, 1.0), (0.5,), text_bias=bias)
        with dit_accel.apply(tiny.pipe, Policy(attention=attention, resolution=staged)) as session:
            results.append(tiny_pipelines.call(tiny, STEPS))
            assert session.stage_bias == 0.0, "taken back after the call"
    assert torch.equal(*results) != moves
    assert torch.equal(tiny_pipelines.call(built(name)[0], STEPS), plain)


def test_a_bias_of_the_text_is_that_of_a_float_mask() -> None:
    query = torch.randn(1, 2, 10, 8)
    bias = text_bias(1.5, TokenGrid(1, 2, 3, 4, text_first=True), query)
    assert bias is not None and bias.tolist() == [[[1.5] * 4 + [0.0] * 6]]
    last = text_bias(1.5, TokenGrid(1, 2, 3, 4), query)
    assert last is not None and last.tolist() == [[[0.0] * 6 + [1.5] * 4]]
    assert text_bias(1.5, TokenGrid(1, 2, 5), query) is None and text_bias(0.0, TokenGrid(1, 2, 3, 4), query) is None
    shown = torch.tensor([True, False] * 5)[None, None, None]
    call = AttentionCall(query, query, query, attn_mask=shown)
    scores = query @ query.mT * 8**-0.5 + bias[:, :, None]
    expected = scores.masked_fill(~shown, -torch.inf).softmax(-1) @ query
    torch.testing.assert_close(call.biased(bias[:, :, None]), expected)  # rounding of float32 alone
    assert torch.equal(added(torch.ones(3), torch.ones(3)), torch.full((3,), 2.0))
