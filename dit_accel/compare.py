"""Compare: a policy against the plain pipeline and against fewer steps at equal cost, same seeds, from tensors."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

import dit_accel
from dit_accel.api import apply
from dit_accel.comparison import ArgumentError, Comparison, Failure, Item, Pictures, Way, WaySummary
from dit_accel.denoiser.find import find_denoisers
from dit_accel.denoiser.subclass import owner_of
from dit_accel.diffusers_bridge import is_pipeline
from dit_accel.errors import DitAccelError, PolicyError, nearest
from dit_accel.policy import Policy, as_policy
from dit_accel.quality import SSIM_WINDOW, images_of, psnr, relative_l2, ssim, summarize
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
