"""Compare: a policy against the plain pipeline and against fewer steps at equal cost, same seeds, from tensors."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

import dit_accel
from dit_accel.api import apply
from dit_accel.charts import comparison_grid, strip_chart, write_atomically
from dit_accel.denoiser.find import find_denoisers
from dit_accel.denoiser.subclass import owner_of
from dit_accel.diffusers_bridge import is_pipeline
from dit_accel.errors import DitAccelError, PolicyError, nearest
from dit_accel.policy import Policy, as_policy
from dit_accel.quality import SSIM_WINDOW, Summary, images_of, psnr, relative_l2, ssim, summarize
from dit_accel.session import Session
from dit_accel.stats import StepRecord, Totals

KEPT = 8  # items whose pictures are kept for the grid
_OWN = {  # arguments that compare sets itself -> what sets them
    "prompt": "`prompts`",
    "generator": "`seeds`",
    "num_inference_steps": "`steps`",
    "timesteps": "`steps`",
    "sigmas": "`steps`",
    "output_type": "compare itself, which needs tensors",
    "return_dict": "compare itself",
    "callback_on_step_end": "compare itself, which reads the last latents",
}


class ArgumentError(DitAccelError, ValueError):
    """An argument of `compare`, or of the pipeline call that it makes, is not allowed."""


@dataclass(frozen=True)
class Way:
    """One way of making one item, held against its plain run. Metrics are means over the item's pictures or frames.

    seconds: median; psnr: inf where all pictures are identical; ssim: `None` for pictures under 11 pixels a side;
    relative_l2: of the final latents, `None` where the pipeline does not show them.
    """

    steps: int
    flops_share: float
    compute_share: float
    seconds: float
    psnr: float
    ssim: float | None
    relative_l2: float | None


@dataclass(frozen=True)
class Item:
    """One prompt and seed."""

    prompt: str | None
    seed: int
    plain_seconds: float
    accelerated: Way
    fewer: Way


@dataclass(frozen=True)
class Failure:
    """An item that could not be made under the policy, and why."""

    prompt: str | None
    seed: int
    error: str


@dataclass(frozen=True)
class WaySummary:
    """Means over the items; wall_ratio: median over the items of seconds / plain seconds; see `quality.Summary`."""

    steps: float
    flops_share: float
    compute_share: float
    wall_ratio: float
    psnr: Summary
    ssim: Summary | None
    relative_l2: Summary | None


@dataclass(frozen=True)
class Pictures:
    """The picture (of a video: the worst frame) of one item, each [1, C, H, W] in [0, 1]."""

    prompt: str | None
    seed: int
    psnr: float
    plain: Tensor
    accelerated: Tensor
    fewer: Tensor


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. accelerated, fewer: summaries over `items`; state_bytes: peak memory of cached features;
    report: the session's own; pictures: of some items and of the worst one; strip: step records of the first item.
    """

    pipeline: str
    policy_name: str | None
    policy: dict[str, Any]
    steps: int
    repeats: int
    threads: int
    arguments: dict[str, Any]
    accelerated: WaySummary
    fewer: WaySummary
    plain_seconds: float
    state_bytes: int
    versions: dict[str, str]
    report: str
    items: tuple[Item, ...]
    failures: tuple[Failure, ...]
    pictures: tuple[Pictures, ...] = field(repr=False, compare=False)
    strip: tuple[StepRecord, ...] = field(repr=False, compare=False)

    @property
    def worst(self) -> Item:
        """The item whose accelerated picture is farthest from the plain one."""
        return self.items[self.accelerated.psnr.worst_index]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready. Numbers that JSON cannot hold are null: a PSNR of null is that of identical pictures
        where `identical` says so, and of a picture that is not finite otherwise."""
        data = {name: value for name, value in vars(self).items() if name not in ("pictures", "strip")}
        data = _plain_data(data | {"worst": {"prompt": self.worst.prompt, "seed": self.worst.seed}})
        for row, item in zip(data["items"], self.items):
            row["accelerated"]["identical"] = item.accelerated.psnr == math.inf
            row["fewer"]["identical"] = item.fewer.psnr == math.inf
        return data

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def table(self) -> str:
        """Aligned text: plain, accelerated and fewer steps, one line each, and what is needed to read them."""
        head = ("", "steps", "FLOPs", "blocks", "wall", "PSNR dB (95 %)", "worst", "SSIM", "worst", "latents rel. L2")
        plain = ("plain", str(self.steps), "1.000", "1.000", "1.00", "reference", "", "", "", "")
        rows = [head, plain, _row("accelerated", self.accelerated), _row("fewer steps", self.fewer)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs)
            )
            for pairs in (list(zip(row, widths)) for row in rows)
        ]
        name = f'"{self.policy_name}"' if self.policy_name else "a policy of your own"
        lines.insert(0, f"{self.pipeline} with {name}, {len(self.items)} items, plain {self.plain_seconds:.2f} s each")
        lines.append(f"Worst accelerated: {_label(self.worst.prompt, self.worst.seed)}.")
        lines.append(f"Cached state: {self.state_bytes / 2**20:.2f} MiB at most.")
        lines += [
            f"{way}: {summary.identical} of {summary.count} items are identical to plain; PSNR is of the others."
            for way, summary in (("accelerated", self.accelerated.psnr), ("fewer steps", self.fewer.psnr))
            if summary.identical
        ]
        lines += [f"Failed: {_label(failure.prompt, failure.seed)}: {failure.error}" for failure in self.failures]
        used = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        lines.append(f"Wall: {self.repeats} interleaved timings an item, {self.threads} torch threads. {used}.")
        return "\n".join(line.rstrip() for line in lines)


def compare(
    pipe: Any,
    policy: Policy | str | os.PathLike[str] | Mapping[str, Any],
    prompts: Sequence[str | None],
    seeds: Sequence[int],
    steps: int = 50,
    arguments: Mapping[str, Any] | None = None,
    repeats: int = 1,
    progress: bool = True,
) -> Comparison:
    """Run each (prompt, seed) plain, accelerated, and plain with fewer steps at the cost of the accelerated run.

    prompts: `[None]` for pipelines that take none, or that get embeddings in `arguments`; arguments: any others of a
    call; repeats: timings of each item, whose pictures are the same; progress: a bar, on a terminal only.
    Fewer steps: the integer nearest to steps * FLOPs share of that item, on the pipeline's own scheduler.
    Wall times are of interleaved calls, after one uncounted call of each kind, with the torch threads that you set.
    An item on which the policy fails is listed in `failures`, and the others go on. The pipe is left as it was.

    Raises PolicyError, UnsupportedModelError, ArgumentError.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    arguments = dict(arguments or {})
    _check(pipe, prompts, seeds, steps, arguments, repeats)
    checked = as_policy(policy)
    session = apply(pipe, checked)  # fails here, before any work, if the policy cannot act on this pipe
    session.remove()
    order = [(prompt, seed) for prompt in prompts for seed in seeds]
    items: list[Item] = []
    failures: list[Failure] = []
    pictures: list[Pictures] = []
    strip: tuple[StepRecord, ...] = ()
    calls = 3 * (1 + len(order) * repeats)
    with tqdm(total=calls, desc="compare", leave=False, disable=None if progress else True) as bar:
        bench = _Bench(pipe, session, arguments, steps, bar)
        bench.warm_up(*order[0])
        for prompt, seed in order:
            try:
                item, shown = bench.item(prompt, seed, repeats)
            except DitAccelError as error:
                failures.append(Failure(prompt, seed, str(error)))
                if len(failures) == len(order):
                    raise
                continue
            strip = strip or bench.last_steps()
            items.append(item)
            pictures.append(shown)
            if len(pictures) > KEPT:  # keep the first ones, and the worst
                new_worst = summarize([each.psnr for each in pictures]).worst_index == KEPT
                del pictures[KEPT - 1 if new_worst else KEPT]
    return Comparison(
        pipeline=type(pipe).__name__,
        policy_name=str(policy) if isinstance(policy, (str, os.PathLike)) else None,
        policy=checked.to_dict(),
        steps=steps,
        repeats=repeats,
        threads=torch.get_num_threads(),
        arguments=arguments,
        accelerated=_summary([(item.plain_seconds, item.accelerated) for item in items]),
        fewer=_summary([(item.plain_seconds, item.fewer) for item in items]),
        plain_seconds=median(item.plain_seconds for item in items),
        state_bytes=session.stats.state_bytes,
        versions={
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "dit_accel": dit_accel.__version__,
        },
        report=session.report(),
        items=tuple(items),
        failures=tuple(failures),
        pictures=tuple(pictures),
        strip=strip,
    )


def write_report(comparison: Comparison, folder: str | os.PathLike[str]) -> list[Path]:
    """Write comparison.json, table.txt, grid.png and strip.png into a folder, each complete or absent; their paths."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"The folder {folder} cannot be made: {error.strerror}; give another one.") from None
    paths = [folder / name for name in ("comparison.json", "table.txt", "grid.png", "strip.png")]
    write_atomically(paths[0], (comparison.to_json() + "\n").encode())
    write_atomically(paths[1], f"{comparison.table()}\n\n{comparison.report}\n".encode())
    shown = comparison.pictures
    labels = [f"{_label(p.prompt, p.seed)}: {_decibel(p.psnr)} dB" for p in shown]
    comparison_grid(torch.cat([p.plain for p in shown]), torch.cat([p.accelerated for p in shown]), paths[2], labels)
    cache, first = comparison.policy["cache"], comparison.items[0]
    title = f"{comparison.policy_name or 'policy'}: {_label(first.prompt, first.seed)}"
    strip_chart(comparison.strip, paths[3], cache and cache["threshold"], title)
    return paths


# ------------------------------------------------------------------------------------------------------ the measuring


@dataclass(frozen=True)
class _Made:
    """images [N, C, H, W] in [0, 1] and final latents of one call, on the CPU, and how long it took."""

    images: Tensor
    latents: Tensor | None
    seconds: float


class _Bench:
    """Makes the calls of one comparison."""

    def __init__(self, pipe: Any, session: Session, arguments: dict[str, Any], steps: int, bar: Any):
        self.pipe, self.session, self.arguments, self.steps, self.bar = pipe, session, arguments, steps, bar
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        self.output_type = "pt"

    def warm_up(self, prompt: str | None, seed: int) -> None:
        """One uncounted call of each kind; finds out whether the pipeline can give tensors, or arrays only."""
        refused: Exception | None = None
        for self.output_type in ("pt", "np"):
            try:
                self.accelerated(prompt, seed)
                break
            except DitAccelError:
                raise
            except (ValueError, TypeError) as error:
                refused = refused or error
        else:
            raise ArgumentError(f"{type(self.pipe).__name__} refused the call: {refused}") from refused
        self.plain(prompt, seed, self.steps)
        self.plain(prompt, seed, _fewer(self.steps, self.last_run().flops_share))
        self.session.reset()

    def item(self, prompt: str | None, seed: int, repeats: int) -> tuple[Item, Pictures]:
        """One prompt and seed, all three ways in turn, `repeats` times."""
        made: list[tuple[_Made, _Made, _Made]] = []
        share, fewest = Totals(), self.steps
        for _ in range(repeats):
            plain = self.plain(prompt, seed, self.steps)
            accelerated = self.accelerated(prompt, seed)
            share = self.last_run()
            fewest = _fewer(self.steps, share.flops_share)
            made.append((plain, accelerated, self.plain(prompt, seed, fewest)))
        plain, accelerated, fewer = made[0]
        seconds = [median(row[kind].seconds for row in made) for kind in range(3)]
        part = fewest / self.steps
        item = Item(
            prompt,
            seed,
            seconds[0],
            _way(plain, accelerated, self.steps, share.flops_share, share.compute_share, seconds[1]),
            _way(plain, fewer, fewest, part, part, seconds[2]),
        )
        level = summarize(psnr(accelerated.images, plain.images))
        shown = slice(level.worst_index, level.worst_index + 1)
        crops = (each.images[shown].clone() for each in (plain, accelerated, fewer))
        return item, Pictures(prompt, seed, level.worst, *crops)

    def last_run(self) -> Totals:
        """Totals of the latest accelerated run."""
        return list(self.session.stats.runs.values())[-1]

    def last_steps(self) -> tuple[StepRecord, ...]:
        """Step records of the latest accelerated run."""
        steps = self.session.stats.steps
        return tuple(step for step in steps if step.run == steps[-1].run)

    def accelerated(self, prompt: str | None, seed: int) -> _Made:
        with _attached(self.session):
            return self.plain(prompt, seed, self.steps)

    def plain(self, prompt: str | None, seed: int, steps: int) -> _Made:
        """One call of the pipe as it stands."""
        last: list[Tensor] = []

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            del pipe, step, timestep
            last[:] = [tensors["latents"].detach().clone()] if "latents" in tensors else []
            return tensors

        own: dict[str, Any] = {"num_inference_steps": steps, "output_type": self.output_type}
        own["generator"] = torch.Generator().manual_seed(seed)
        if prompt is not None:
            own["prompt"] = prompt
        if "callback_on_step_end" in self.parameters:
            own["callback_on_step_end"] = keep
        modular = "num_inference_steps" not in self.parameters
        if modular:
            own["output"] = "images"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # some pipelines encode their inputs without the generator
            started = time.perf_counter()
            result = self.pipe(**self.arguments, **own)
            images = images_of(result if modular else result[0])  # on the CPU, so all work is done
            seconds = time.perf_counter() - started
        self.bar.update()
        return _Made(images, last[0].float().cpu() if last else None, seconds)


@contextlib.contextmanager
def _attached(session: Session) -> Iterator[None]:
    """Put a removed session back for one call. FLOPs that it has counted stay known: counting slows a call down."""
    meters = {name: attached.meter for name, attached in session.denoisers.items()}
    session.attach()
    try:
        for name, attached in session.denoisers.items():
            attached.meter = meters.get(name, attached.meter)
        yield
    finally:
        session.remove()


def _fewer(steps: int, share: float) -> int:
    """Number of plain steps that costs a share of `steps`, at least one."""
    return max(1, math.floor(steps * share + 0.5))


def _way(plain: _Made, made: _Made, steps: int, flops: float, blocks: float, seconds: float) -> Way:
    similar, distance = None, None
    if min(plain.images.shape[-2:]) >= SSIM_WINDOW:
        similar = float(ssim(made.images, plain.images).mean())
    if plain.latents is not None and made.latents is not None and plain.latents.shape == made.latents.shape:
        distance = float(relative_l2(made.latents[None], plain.latents[None]))
    level = summarize(psnr(made.images, plain.images)).mean
    return Way(steps, flops, blocks, seconds, level, similar, distance)


def _summary(rows: Sequence[tuple[float, Way]]) -> WaySummary:
    ways = [way for _, way in rows]
    similar = [way.ssim for way in ways if way.ssim is not None]
    distances = [way.relative_l2 for way in ways if way.relative_l2 is not None]
    return WaySummary(
        steps=fmean(way.steps for way in ways),
        flops_share=fmean(way.flops_share for way in ways),
        compute_share=fmean(way.compute_share for way in ways),
        wall_ratio=median(way.seconds / plain for plain, way in rows),
        psnr=summarize([way.psnr for way in ways]),
        ssim=summarize(similar) if similar else None,
        relative_l2=summarize(distances, larger_is_better=False) if distances else None,
    )


def _check(pipe: Any, prompts: Sequence[Any], seeds: Sequence[Any], steps: int, arguments: Any, repeats: int) -> None:
    """Everything that can be known to be wrong before any work."""
    if not is_pipeline(pipe):
        raise ArgumentError(f"compare() got {type(pipe).__name__}; give a diffusers pipeline.")
    if any(owner_of(part) is not None for part in (pipe, *find_denoisers(pipe).values())):
        raise PolicyError(
            f"This {type(pipe).__name__} already belongs to a session, so its plain run would not be plain; "
            "call remove() on that session first."
        )
    for name, values in (("prompts", prompts), ("seeds", seeds)):
        if not len(values):
            raise ArgumentError(
                f"compare() got no {name}; give at least one" + " (None for no prompt)." * (name[0] == "p")
            )
    for name, number in (("steps", steps), ("repeats", repeats)):
        if type(number) is not int or number < 1:
            raise ArgumentError(f"compare() got {name}={number!r}; give an integer of at least 1.")
    if not all(type(seed) is int for seed in seeds):
        raise ArgumentError(f"compare() got seeds={list(seeds)!r}; give integers.")
    for name in arguments:
        if name in _OWN:
            raise ArgumentError(
                f"compare() got the call argument {name!r}, which is set by {_OWN[name]}; leave it out."
            )
    parameters = inspect.signature(type(pipe).__call__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    given = [*arguments, *(["prompt"] if any(prompt is not None for prompt in prompts) else [])]
    for name in given:
        if name not in parameters:
            allowed = [key for key in parameters if key != "self" and key not in _OWN]
            raise ArgumentError(f"{type(pipe).__name__} takes no argument {name!r}; {nearest(name, allowed)}.")


# ----------------------------------------------------------------------------------------------------------- the text


def _row(name: str, way: WaySummary) -> tuple[str, ...]:
    level, similar, distance = way.psnr, way.ssim, way.relative_l2
    interval = "" if math.isinf(level.mean) else f" ({level.low:.2f} to {level.high:.2f})"
    return (
        name,
        f"{way.steps:.3g}",
        f"{way.flops_share:.3f}",
        f"{way.compute_share:.3f}",
        f"{way.wall_ratio:.2f}",
        _decibel(level.mean) + interval,
        _decibel(level.worst),
        f"{similar.mean:.4f}" if similar else "-",
        f"{similar.worst:.4f}" if similar else "-",
        f"{distance.mean:.4f}" if distance else "-",
    )


def _decibel(level: float) -> str:
    return "identical" if level == math.inf else f"{level:.2f}"


def _label(prompt: str | None, seed: int) -> str:
    return f"seed {seed}" if prompt is None else f'"{prompt}", seed {seed}'


def _plain_data(value: Any) -> Any:
    """JSON-ready: dataclasses and tuples become dictionaries and lists, tensors their shape, inf and NaN null."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_data(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    return value if isinstance(value, (str, int)) or value is None else f"<{type(value).__name__}>"
