"""What one observed forward teaches about a model, and what skipping does to it, on small hand-written transformers.

A toy is lists of blocks and one function, the wiring, that calls them. `Work` is the part of a block that costs: it
counts its calls, so that a test can tell whether a skipped block was really not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_accel
from dit_accel import BlockCache, Forecast, Policy, UnsupportedModelError
from dit_accel.denoiser.contract import shape_key

WIDTH, ROWS, STEPS = 4, 6, 8
# Step 0 is observed, step 1 gives the first anchor, then two skips after each computed step, and the last is computed.
REUSE = Policy(BlockCache(threshold=None, max_skips=2, warmup=2, tail=1))
COMPUTED, SKIPPED = (0, 1, 4, 7), (2, 3, 5, 6)


class Work(nn.Module):
    """x [B, S, D] -> a change of x [B, S, D]."""

    def __init__(self, width: int = WIDTH, out: int | None = None):
        super().__init__()
        self.linear, self.calls = nn.Linear(width, out or width), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x))


class Block(nn.Module):
    """Base of the toy blocks; `calls` says how often it did its work."""

    def __init__(self, **work: int):
        super().__init__()
        self.work = Work(**work)

    @property
    def calls(self) -> int:
        return self.work.calls


class Positional(Block):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return x + self.work(x) + 0.1 * temb


class Keyword(Block):
    def forward(self, *, temb: Tensor, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.work(hidden_states) + 0.1 * temb


class OneTuple(Block):
    def forward(self, x: Tensor, temb: Tensor) -> tuple[Tensor]:
        return (x + self.work(x) + 0.1 * temb,)


class OneList(Block):
    def forward(self, x: Tensor, temb: Tensor) -> list[Tensor]:
        return [x + self.work(x) + 0.1 * temb]


class HiddenFirst(Block):
    """Two streams of different length, returned in the order they came in."""

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.work(x) + text.mean(), text + self.work.linear(text)


class EncoderFirst(Block):
    """As Flux and SD3: two streams, returned in the other order than they came in."""

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return text + self.work.linear(text), x + self.work(x) + text.mean()


class EncoderFirstLast(Block):
    """As the last block of SD3: the text is not needed any more."""

    def forward(self, x: Tensor, text: Tensor) -> tuple[None, Tensor]:
        return None, x + self.work(x) + text.mean()


class UpBlock(Block):
    """As the second half of a UViT: takes the output of a block of the first half as well."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.join(torch.cat([x, skip], -1)) + self.work(x)


class InPlace(Block):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return x.add_(self.work(x))


class InPlaceView(Block):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x[:, 0] += 1.0
        return x + self.work(x)


class WritesCache(Block):
    def forward(self, x: Tensor, cache: dict[str, Any]) -> Tensor:
        cache[f"key{len(cache)}"] = x
        return x + self.work(x)


class WritesCacheObject(Block):
    def forward(self, x: Tensor, cache: Any) -> Tensor:
        cache.last = x
        return x + self.work(x)


class ReturnsMap(Block):
    """Also returns an attention map, which no later block takes."""

    def forward(self, x: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.work(x), x @ x.transpose(1, 2)


class ReturnsDict(Block):
    def forward(self, x: Tensor, temb: Tensor) -> tuple[Tensor, dict[str, int]]:
        return x + self.work(x), {"kept": 1}


class Toy(nn.Module):
    """lists: name -> blocks; wiring: (toy, x, text, temb) -> y, all [B, S, D]."""

    def __init__(self, wiring: Callable[..., Tensor], **lists: list[Any]):
        super().__init__()
        for name, blocks in lists.items():
            setattr(self, name, nn.ModuleList(blocks))
        self.wiring = wiring
        self.proj_out = nn.Linear(WIDTH, WIDTH)
        self.variant = "usual"
        generator = torch.Generator().manual_seed(len(lists))
        for parameter in self.parameters():
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))

    def forward(self, hidden_states: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        temb = torch.ones(1, 1, WIDTH)
        return self.proj_out(self.wiring(self, hidden_states, text, temb))

    def blocks_of(self, *lists: str) -> list[Block]:
        return [block for name in lists for block in getattr(self, name)]


def make(count: int, kind: Callable[[], nn.Module]) -> list[nn.Module]:
    return [kind() for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------- wirings


def chain(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in toy.blocks:
        x = block(x, temb)
    return x


def chain_keywords(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in toy.blocks:
        x = block(hidden_states=x, temb=temb)
    return x


def chain_first_item(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in toy.blocks:
        x = block(x, temb)[0]
    return x


def hidden_first(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in toy.blocks:
        x, text = block(x, text)
    return x + text.mean()


def encoder_first(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in toy.blocks:
        text, x = block(x, text=text)
    return x if text is None else x + text.mean()


def residual_between(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """As a ControlNet: something is added to the stream after every block."""
    for number, block in enumerate(toy.blocks):
        x = block(x, temb)
        x = x + 0.1 * (number + 1)
    return x


def written_between(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for number, block in enumerate(toy.blocks):
        x = block(x, temb)
        x[:, :2] += 0.1 * (number + 1)
    return x


def long_skips(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    kept = []
    for block in toy.down:
        x = block(x, temb)
        kept.append(x)
    for block in toy.up:
        x = block(x, kept.pop())
    return x


def double_then_single(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in toy.pairs:
        text, x = block(x, text)
    joined = torch.cat([text, x], 1)
    for block in toy.singles:
        joined = block(joined, temb)
    return joined[:, text.shape[1] :]


def interleaved(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for first, second in zip(toy.space, toy.time):
        x = second(first(x, temb), temb)
    return x


def side_list_first(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """Refiners of the text, of another shape than the stream."""
    for block in toy.refiner:
        text = block(text, temb)
    x = x + text.mean()
    return chain(toy, x, text, temb)


def side_list_between(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """As WanVACE or a motion encoder: a list of its own runs next to the stream."""
    for block, side in zip(toy.blocks, toy.side):
        text = side(text, temb)
        x = block(x, temb)
    return x + text.mean()


def one_block_twice(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for number in (0, 1, 1, 2):
        x = toy.blocks[number](x, temb)
    return x


def with_cache(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    cache: dict[str, Any] = {}
    for block in toy.blocks:
        x = block(x, cache)
    return x


def with_cache_object(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    @dataclass
    class Cache:
        last: Any = None

    cache = Cache()
    for block in toy.blocks:
        x = block(x, cache)
    return x


def with_read_cache(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in toy.blocks:
        x = block(x, temb, options={"scale": 1.0})
    return x


def changing(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """Calls that depend on something that no argument shows."""
    order = {"usual": (0, 1, 2, 3), "fewer": (0, 1, 2), "more": (0, 1, 2, 3, 3), "other": (0, 2, 1, 3), "none": ()}
    for number in order[toy.variant]:
        x = toy.blocks[number](x, temb)
    return x


# ------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """Outputs and block symbols of every step, and how often each block worked at each step."""

    outputs: list[Tensor] = field(default_factory=list)
    symbols: list[str] = field(default_factory=list)
    work: list[list[int]] = field(default_factory=list)


def inputs(step: int, drift: float) -> tuple[Tensor, Tensor]:
    """Latent and text of a step; with a drift of 0 the same at every step."""
    generator = torch.Generator().manual_seed(1)
    x, text, direction = (torch.randn(2, rows, WIDTH, generator=generator) for rows in (ROWS, 3, ROWS))
    return x + drift * step * direction, text


def sample(
    toy: Toy, session: Any = None, drift: float = 0.0, steps: int = STEPS, at: dict[int, str] | None = None
) -> Run:
    """Call the toy once a step, in a run of the session where there is one. at: step -> variant from there on."""
    run = Run()
    blocks = [child for child in toy.modules() if isinstance(child, Block)]
    for step in range(steps):
        toy.variant = (at or {}).get(step, toy.variant)
        before = [block.calls for block in blocks]
        x, text = inputs(step, drift)
        run.outputs.append(toy(x, text, timestep=torch.tensor([1000.0 - step])))
        run.work.append([block.calls - earlier for block, earlier in zip(blocks, before)])
    toy.variant = "usual"
    run.symbols = [record.blocks for record in session.stats.steps] if session else []
    return run


def accelerated(toy: Toy, policy: Policy = REUSE, strict: bool = True, **settings: Any) -> tuple[Run, Any]:
    session = dit_accel.apply(toy, policy, strict=strict)
    with torch.no_grad(), session.run(steps=STEPS):
        run = sample(toy, session, **settings)
    session.remove()
    return run, session


def plain(toy: Toy, **settings: Any) -> Run:
    with torch.no_grad():
        return sample(toy, **settings)


def tied(kind: Callable[[], nn.Module]) -> list[nn.Module]:
    """One block that stands in its list four times."""
    return [kind()] * 4


# toy -> the block calls of a skipped step: # computed, - skipped
ACCEPTED: dict[str, tuple[Callable[[], Toy], str]] = {
    "positional": (lambda: Toy(chain, blocks=make(4, Positional)), "#---"),
    "tied": (lambda: Toy(chain, blocks=tied(Positional)), "#---"),
    "keyword": (lambda: Toy(chain_keywords, blocks=make(4, Keyword)), "#---"),
    "tuple": (lambda: Toy(chain_first_item, blocks=make(4, OneTuple)), "#---"),
    "list": (lambda: Toy(chain_first_item, blocks=make(4, OneList)), "#---"),
    "hidden first": (lambda: Toy(hidden_first, blocks=make(4, HiddenFirst)), "#---"),
    "encoder first": (lambda: Toy(encoder_first, blocks=make(4, EncoderFirst)), "#---"),
    "last returns none": (lambda: Toy(encoder_first, blocks=[*make(3, EncoderFirst), EncoderFirstLast()]), "#---"),
    "residual between": (lambda: Toy(residual_between, blocks=make(4, Positional)), "#---"),
    "written between": (lambda: Toy(written_between, blocks=make(4, Positional)), "#---"),
    "long skips": (lambda: Toy(long_skips, down=make(3, Positional), up=make(3, UpBlock)), "#-----"),
    "double, single": (
        lambda: Toy(double_then_single, pairs=make(2, EncoderFirst), singles=make(3, Positional)),
        "#----",
    ),
    "interleaved": (lambda: Toy(interleaved, space=make(3, Positional), time=make(3, Positional)), "#-----"),
    "side list first": (
        lambda: Toy(side_list_first, refiner=make(2, Positional), blocks=make(4, Positional)),
        "###---",
    ),
    "side list between": (
        lambda: Toy(side_list_between, blocks=make(4, Positional), side=make(4, Positional)),
        "##" + 3 * "#-",
    ),
    "one block twice": (lambda: Toy(one_block_twice, blocks=make(3, Positional)), "#---"),
    "three blocks": (lambda: Toy(chain, blocks=make(3, Positional)), "#--"),
}
accepted = pytest.mark.parametrize(("build", "skipped"), ACCEPTED.values(), ids=ACCEPTED.keys())


@accepted
def test_computed_steps_are_bit_equal_and_skipped_blocks_do_not_run(build: Callable[[], Toy], skipped: str) -> None:
    toy = build()
    want = plain(toy, drift=0.1)
    run, session = accelerated(toy, drift=0.1)
    assert [run.symbols[step] for step in SKIPPED] == [skipped] * len(SKIPPED)
    assert [run.symbols[step] for step in COMPUTED] == ["#" * len(skipped)] * len(COMPUTED)
    for step in COMPUTED:
        assert torch.equal(run.outputs[step], want.outputs[step])
        assert run.work[step] == want.work[step]
    for step in SKIPPED:
        assert sum(run.work[step]) == skipped.count("#")
        assert not torch.equal(run.outputs[step], want.outputs[step])
    assert session.stats.warnings == []
    again = plain(toy, drift=0.1)
    assert all(torch.equal(a, b) for a, b in zip(again.outputs, want.outputs))


@accepted
@pytest.mark.parametrize("forecast", [None, Forecast("newton", 1), Forecast("taylor", 2)])
def test_with_constant_input_a_skipped_step_gives_the_plain_result(
    build: Callable[[], Toy], skipped: str, forecast: Forecast | None
) -> None:
    """Whatever is added twice, dropped or taken from the wrong stream would show."""
    toy = build()
    want = plain(toy, drift=0.0)
    run, _ = accelerated(toy, Policy(REUSE.cache, forecast), drift=0.0)
    for got, expected in zip(run.outputs, want.outputs):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_two_probe_blocks() -> None:
    toy = Toy(chain, blocks=make(5, Positional))
    policy = Policy(BlockCache(threshold=None, max_skips=2, warmup=2, tail=1, probe_blocks=2))
    run, _ = accelerated(toy, policy, drift=0.1)
    assert [run.symbols[step] for step in SKIPPED] == ["##---"] * 4


# ---------------------------------------------------------------------------------------- the numbers, done by hand


def blockwise(toy: Any, step: int, drift: float) -> list[Tensor]:
    """Output of every block of a plain chain at a step."""
    x, _ = inputs(step, drift)
    outputs = []
    with torch.no_grad():
        for block in toy.blocks:
            x = block(x, torch.ones(1, 1, WIDTH))
            outputs.append(x)
    return outputs


@pytest.mark.parametrize(
    ("forecast", "weights"),
    [
        (None, {2: {1: 1.0}, 3: {1: 1.0}, 5: {4: 1.0}, 6: {4: 1.0}}),
        # one anchor at first; from step 4 on two, at 1 and 4: (v - 1) / 3 and (4 - v) / 3
        (Forecast("newton", 1), {2: {1: 1.0}, 3: {1: 1.0}, 5: {1: -1 / 3, 4: 4 / 3}, 6: {1: -2 / 3, 4: 5 / 3}}),
        (Forecast("taylor", 1), {2: {1: 1.0}, 3: {1: 1.0}, 5: {1: -1 / 3, 4: 4 / 3}, 6: {1: -2 / 3, 4: 5 / 3}}),
    ],
)
def test_the_tail_is_the_head_plus_the_forecast_residual(
    forecast: Forecast | None, weights: dict[int, dict[int, float]]
) -> None:
    toy = Toy(chain, blocks=make(4, Positional))
    run, session = accelerated(toy, Policy(REUSE.cache, forecast), drift=0.1)
    for step, parts in weights.items():
        head = blockwise(toy, step, 0.1)[0]
        residuals = {anchor: blockwise(toy, anchor, 0.1) for anchor in parts}
        tail = head + sum(w * (residuals[anchor][-1] - residuals[anchor][0]) for anchor, w in parts.items())
        torch.testing.assert_close(run.outputs[step], toy.proj_out(tail).detach(), rtol=1e-5, atol=1e-5)
        assert session.stats.steps[step].decision == ("forecast" if len(parts) > 1 else "reuse")


def test_two_streams_are_continued_apart() -> None:
    toy: Any = Toy(encoder_first, blocks=make(4, EncoderFirst))
    run, _ = accelerated(toy, drift=0.1)
    outputs = {}
    with torch.no_grad():
        for step in (1, 2):
            x, text = inputs(step, 0.1)
            outputs[step] = []
            for block in toy.blocks:
                text, x = block(x, text)
                outputs[step].append((text, x))
        text, x = (
            head + tail - anchor
            for head, tail, anchor in zip(outputs[2][0], outputs[1][-1], outputs[1][0], strict=True)
        )
        expected = toy.proj_out(x + text.mean())
    torch.testing.assert_close(run.outputs[2], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["written between", "double, single"])
def test_where_no_residual_is_possible_the_value_itself_is_kept(name: str) -> None:
    """Code that writes into the head's output in place, or a tail of another shape than the head."""
    toy = ACCEPTED[name][0]()
    run, _ = accelerated(toy, drift=0.1)
    for step, anchor in ((2, 1), (3, 1), (5, 4), (6, 4)):
        torch.testing.assert_close(run.outputs[step], run.outputs[anchor], rtol=1e-5, atol=1e-5)


def test_an_indicator_of_the_probe_is_the_relative_change_of_its_residual() -> None:
    toy = Toy(chain, blocks=make(4, Positional))
    policy = Policy(BlockCache(threshold=100.0, max_skips=2, warmup=2, tail=1))
    _, session = accelerated(toy, policy, drift=0.1)
    probes = {step: blockwise(toy, step, 0.1)[0] - inputs(step, 0.1)[0] for step in (1, 2, 3)}
    for step in (2, 3):
        change = (probes[step] - probes[1]).abs().mean() / probes[1].abs().mean()
        assert session.stats.steps[step].indicator == pytest.approx(change.item(), rel=1e-4)
    assert session.stats.steps[4].reason == "longest run"


def test_two_streams_of_one_shape_are_told_apart_by_where_they_go_next() -> None:
    """The text, first of the outputs and second of the inputs, is the same at every step, and so is its residual."""

    def wiring(toy: Any, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        return encoder_first(toy, x, torch.cat([text, text], 1), temb)

    policy = Policy(BlockCache(threshold=100.0, max_skips=2, warmup=2, tail=1))
    _, session = accelerated(Toy(wiring, blocks=make(4, EncoderFirst)), policy, drift=0.1)
    assert [session.stats.steps[step].indicator for step in SKIPPED] == [0.0] * len(SKIPPED)


# ----------------------------------------------------------------------------------------------------------- refused

REFUSED: dict[str, tuple[Callable[[], Toy], str]] = {
    "in place": (lambda: Toy(chain, blocks=make(4, InPlace)), "InPlace in blocks writes into its input in place"),
    "view": (lambda: Toy(chain, blocks=make(4, InPlaceView)), "InPlaceView in blocks writes into its input in place"),
    "one in place": (
        lambda: Toy(chain, blocks=[*make(3, Positional), InPlace()]),
        "InPlace in blocks writes into its input in place",
    ),
    "cache": (lambda: Toy(with_cache, blocks=make(4, WritesCache)), "writes to a cache of its own"),
    "cache object": (lambda: Toy(with_cache_object, blocks=make(4, WritesCacheObject)), "writes to a cache of its own"),
    "map": (lambda: Toy(chain_first_item, blocks=make(4, ReturnsMap)), "returns something that is none of its inputs"),
    "dict": (lambda: Toy(chain_first_item, blocks=make(4, ReturnsDict)), "returns something that is not a tensor"),
    "short": (lambda: Toy(chain, blocks=make(2, Positional)), "the longest stack has 2 blocks, 3 are needed"),
    "unused": (lambda: Toy(lambda toy, x, text, temb: x, blocks=make(4, Positional)), "no block was called"),
}
refused = pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED.keys())
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@refused
@modes
def test_what_cannot_be_skipped_is_refused_with_the_reason(
    build: Callable[[], Toy], reason: str, mode: Callable[[], Any]
) -> None:
    session = dit_accel.apply(build(), REUSE)
    with mode(), session.run(steps=STEPS), pytest.raises(UnsupportedModelError) as error:
        sample(session.target, session)
    assert reason in str(error.value) and "strict=False" in str(error.value)


@refused
@modes
def test_without_strict_it_is_computed_and_said(build: Callable[[], Toy], reason: str, mode: Callable[[], Any]) -> None:
    toy = build()
    with mode():
        want = sample(toy, drift=0.1)
        session = dit_accel.apply(toy, REUSE, strict=False)
        with session.run(steps=STEPS):
            run = sample(toy, session, drift=0.1)
    assert all(torch.equal(got, expected) for got, expected in zip(run.outputs, want.outputs))
    assert run.work == want.work
    assert [warning for warning in session.stats.warnings if reason in warning]
    assert all(record.reason.startswith(("observing", "refused: ")) for record in session.stats.steps)
    assert reason in session.report() and "Nothing was skipped" in session.report()


@pytest.mark.parametrize("name", ["positional", "written between", "encoder first", "long skips"])
def test_under_inference_mode_the_same_is_learned(name: str) -> None:
    """Inference mode keeps no version counters; writes in place have to be noticed all the same."""
    toy = ACCEPTED[name][0]()
    usual, _ = accelerated(toy, drift=0.1)
    session = dit_accel.apply(toy, REUSE)
    with torch.inference_mode(), session.run(steps=STEPS):
        run = sample(toy, session, drift=0.1)
    assert run.symbols == usual.symbols
    assert all(torch.equal(got, expected) for got, expected in zip(run.outputs, usual.outputs))


# ------------------------------------------------------------------------------------------- changes during a run


@pytest.mark.parametrize("variant", ["fewer", "more", "other", "none"])
@pytest.mark.parametrize("step", [2, 3, 5])
def test_another_order_on_a_skipped_step_is_computed_anew(variant: str, step: int) -> None:
    toy = Toy(changing, blocks=make(4, Positional))
    switch = {step: variant, step + 1: "usual"}
    want = plain(toy, drift=0.1, at=switch)
    run, session = accelerated(toy, drift=0.1, at=switch)
    assert torch.equal(run.outputs[step], want.outputs[step])
    record = session.stats.steps[step]
    assert record.reason.startswith("contract changed: ")
    assert record.blocks_total == sum(want.work[step])
    assert record.blocks_run == sum(run.work[step])  # what the failed attempt ran is counted too
    if variant != "none":  # with no block called nothing was skipped, so nothing had to be undone
        assert record.decision == "recompute"
        assert [warning for warning in session.stats.warnings if "left its learned contract" in warning]
    assert "contract changed" in session.report()


@pytest.mark.parametrize("variant", ["fewer", "more", "other", "none"])
def test_another_order_on_a_computed_step_is_told_and_dropped(variant: str) -> None:
    toy = Toy(changing, blocks=make(4, Positional))
    switch = {4: variant, 5: "usual"}
    want = plain(toy, drift=0.1, at=switch)
    run, session = accelerated(toy, drift=0.1, at=switch)
    # the anchors are gone, so the step behind it has nothing to reuse
    assert all(torch.equal(run.outputs[step], want.outputs[step]) for step in (4, 5))
    assert session.stats.steps[4].reason.startswith("contract changed: ")
    assert session.stats.steps[5].reason == "no anchor"


@pytest.mark.parametrize("variant", ["fewer", "more", "other"])
def test_an_order_that_stays_changed_is_computed_to_the_end(variant: str) -> None:
    toy = Toy(changing, blocks=make(4, Positional))
    want = plain(toy, drift=0.1, at={3: variant})
    run, session = accelerated(toy, drift=0.1, at={3: variant})
    assert all(torch.equal(run.outputs[step], want.outputs[step]) for step in range(3, STEPS))
    assert [record.step for record in session.stats.steps] == list(range(STEPS))


def test_another_shape_is_observed_anew() -> None:
    toy = Toy(chain, blocks=make(4, Positional))
    session = dit_accel.apply(toy, REUSE)
    with torch.no_grad(), session.run():
        for step in range(6):
            x, text = inputs(step, 0.1)
            x = x[:, : ROWS - (step >= 3)]
            toy(x, text, timestep=torch.tensor([float(step)]))
    assert [record.reason for record in session.stats.steps] == [
        "observing",
        "warm-up",
        "schedule",
        "observing",
        "no anchor",
        "schedule",
    ]
    assert any("changed shape" in warning for warning in session.stats.warnings)


def test_a_second_run_learns_again() -> None:
    toy = Toy(changing, blocks=make(4, Positional))
    session = dit_accel.apply(toy, REUSE)
    with torch.no_grad():
        for variant in ("usual", "fewer"):
            toy.variant = variant
            with session.run(steps=STEPS):
                sample(toy, session, drift=0.1, at={0: variant})
    assert [record.blocks for record in session.stats.steps if record.step == 2] == ["#---", "#--"]
    assert session.stats.warnings == []


# ------------------------------------------------------------------------------------------------------------- keys


def test_shape_key_tells_what_anchors_depend_on() -> None:
    x = torch.zeros(2, 3)
    same = [((x,), {"t": x, "n": 1}), ((x + 1,), {"n": 2, "t": x}), ([x], {"t": x, "n": 3})]
    assert len({shape_key(call) for call in same}) == 1
    other = [
        ((x[:1],), {"t": x, "n": 1}),
        ((x.double(),), {"t": x, "n": 1}),
        ((x, None), {"t": x, "n": 1}),
        ((None,), {"t": x, "n": 1}),
        ((x,), {"t": x, "n": 1, "flag": True}),
        ((x,), {"t": x, "n": 1, "flag": False}),
        ((x,), {"t": x, "n": 1, "flag": "a"}),
        ((x,), {"t": {"deep": x}, "n": 1}),
        ((x.to("meta"),), {"t": x, "n": 1}),
    ]
    assert len({shape_key(call) for call in [same[0], *other]}) == len(other) + 1
