"""Compare: a policy against the plain pipeline and against fewer steps at equal cost, same seeds, from tensors."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import diffusers
import torch
from tqdm import tqdm

import dit_accel
from dit_accel.api import apply
from dit_accel.calls import Caller, Made
from dit_accel.comparison import Clip, Comparison, Failure, Item, Motion, MotionSummary, Pictures, Way, WaySummary
from dit_accel.denoiser.find import find_denoisers
from dit_accel.denoiser.subclass import owner_of
from dit_accel.errors import ArgumentError, DitAccelError, PolicyError
from dit_accel.features import FeatureExtractor
from dit_accel.policy import Policy, as_policy
from dit_accel.quality import (
    SSIM_WINDOW,
    caption_satisfied,
    feature_distance,
    psnr,
    relative_l2,
    ssim,
    summarize,
)
from dit_accel.session import Session
from dit_accel.stats import StepRecord, Totals
from dit_accel.video import flicker, frame_psnr, temporal_psnr, worst_frame_psnr

KEPT = 8  # items whose pictures are kept for the grid


def compare(
    pipe: Any,
    policy: Policy | str | os.PathLike[str] | Mapping[str, Any],
    prompts: Sequence[str | None],
    seeds: Sequence[int],
    steps: int = 50,
    arguments: Mapping[str, Any] | None = None,
    repeats: int = 1,
    progress: bool = True,
    paired: bool = False,
    classifier: FeatureExtractor | None = None,
) -> Comparison:
    """Run each (prompt, seed) plain, accelerated, and plain with fewer steps at the cost of the accelerated run.

    prompts: texts, or classes by name or number for pipelines that are told a class; `[None]` for pipelines that take
    none, or that get embeddings in `arguments`; arguments: any others of a call; repeats: timings of each item, whose
    pictures are the same; progress: a bar, on a terminal only; paired: prompt i with seed i alone, instead of every
    prompt with every seed; classifier: adds feature distances, and in how many items it sees what the prompt says.
    Fewer steps: the integer nearest to steps * FLOPs share of that item, on the pipeline's own scheduler.
    Wall times are of interleaved calls, after one uncounted call of each kind, with the torch threads that you set.
    An item on which the policy fails is listed in `failures`, and the others go on. The pipe is left as it was.

    Raises PolicyError, UnsupportedModelError, ArgumentError.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    caller = _checked_caller(pipe, prompts, seeds, steps, arguments, repeats)
    checked = as_policy(policy)
    session = apply(pipe, checked)  # fails here, before any work, if the policy cannot act on this pipe
    session.remove()
    if paired and len(prompts) != len(seeds):
        raise ArgumentError(
            f"compare() got {len(prompts)} prompts and {len(seeds)} seeds in pairs; give as many of both."
        )
    order = list(zip(prompts, seeds)) if paired else list(itertools.product(prompts, seeds))
    items: list[Item] = []
    failures: list[Failure] = []
    pictures: list[Pictures] = []
    clip: Clip | None = None
    strip: tuple[StepRecord, ...] = ()
    calls = 3 * (1 + len(order) * repeats)
    with tqdm(total=calls, desc="compare", leave=False, disable=None if progress else True) as bar:
        bench = _Bench(caller, session, steps, bar, classifier)
        bench.warm_up(*order[0])
        for prompt, seed in order:
            try:
                item, shown, moving = bench.item(prompt, seed, repeats)
            except DitAccelError as error:
                failures.append(Failure(prompt, seed, str(error)))
                if len(failures) == len(order):
                    raise
                continue
            strip = strip or bench.last_steps()
            items.append(item)
            pictures.append(shown)
            if summarize([each.accelerated.psnr for each in items]).worst_index == len(items) - 1:
                clip = moving  # of one item only: a clip may be large
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
        arguments=caller.arguments,
        accelerated=_summary([(item.plain_seconds, item.accelerated) for item in items]),
        fewer=_summary([(item.plain_seconds, item.fewer) for item in items]),
        plain_seconds=median(item.plain_seconds for item in items),
        plain_satisfied=_share([item.plain_satisfied for item in items]),
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
        clip=clip,
        strip=strip,
    )


# ------------------------------------------------------------------------------------------------------ the measuring


class _Bench:
    """Makes the calls of one comparison."""

    def __init__(self, caller: Caller, session: Session, steps: int, bar: Any, classifier: FeatureExtractor | None):
        self.caller, self.session, self.steps, self.bar, self.classifier = caller, session, steps, bar, classifier

    def warm_up(self, prompt: str | None, seed: int) -> None:
        """One uncounted call of each kind."""
        self.accelerated(prompt, seed)
        made = self.plain(prompt, seed, self.steps)
        if self.classifier is not None:
            self.classifier.features(made.pictures)  # refuses videos if it is one for images, before all the work
        self.plain(prompt, seed, _fewer(self.steps, self.last_run().flops_share))
        self.session.reset()

    def item(self, prompt: str | None, seed: int, repeats: int) -> tuple[Item, Pictures, Clip | None]:
        """One prompt and seed, all three ways in turn, `repeats` times."""
        made: tuple[Made, Made, Made] | None = None
        seconds: list[tuple[float, ...]] = []
        share, fewest = Totals(), self.steps
        for _ in range(repeats):
            plain = self.plain(prompt, seed, self.steps)
            accelerated = self.accelerated(prompt, seed)
            share = self.last_run()
            fewest = _fewer(self.steps, share.flops_share)
            turn = (plain, accelerated, self.plain(prompt, seed, fewest))
            made = made or turn
            seconds.append(tuple(each.seconds for each in turn))
        assert made is not None
        plain, accelerated, fewer = made
        middle = [median(turn[kind] for turn in seconds) for kind in range(3)]
        part, costs = fewest / self.steps, (share.flops_share, share.compute_share)
        item = Item(
            prompt,
            seed,
            middle[0],
            self.seen(prompt, plain, accelerated, way_of(plain, accelerated, self.steps, *costs, middle[1])),
            self.seen(prompt, plain, fewer, way_of(plain, fewer, fewest, part, part, middle[2])),
            caption_seen(self.classifier, prompt, plain),
        )
        level = summarize(psnr(accelerated.frames, plain.frames))
        shown = slice(level.worst_index, level.worst_index + 1)
        crops = (each.frames[shown].clone() for each in made)
        return item, Pictures(prompt, seed, level.worst, *crops), _worst_clip(prompt, seed, *made)

    def seen(self, prompt: str | None, plain: Made, made: Made, way: Way) -> Way:
        """With what the classifier sees."""
        if self.classifier is None:
            return way
        distance = float(feature_distance(made.pictures, plain.pictures, self.classifier).mean())
        return replace(way, feature_distance=distance, satisfied=caption_seen(self.classifier, prompt, made))

    def last_run(self) -> Totals:
        """Totals of the latest accelerated run."""
        return list(self.session.stats.runs.values())[-1]

    def last_steps(self) -> tuple[StepRecord, ...]:
        """Step records of the latest accelerated run."""
        steps = self.session.stats.steps
        return tuple(step for step in steps if step.run == steps[-1].run)

    def accelerated(self, prompt: str | None, seed: int) -> Made:
        with _attached(self.session):
            return self.plain(prompt, seed, self.steps)

    def plain(self, prompt: str | None, seed: int, steps: int) -> Made:
        """One call of the pipe as it stands."""
        made = self.caller.make(prompt, seed, steps)
        self.bar.update()
        return made


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


def way_of(plain: Made, made: Made, steps: int, flops: float, blocks: float, seconds: float) -> Way:
    """A run held against the plain run of the same seed. flops, blocks: shares of the plain run's."""
    similar, distance = None, None
    if min(plain.pictures.shape[-2:]) >= SSIM_WINDOW:
        similar = float(ssim(made.frames, plain.frames).mean())
    if plain.latents is not None and made.latents is not None and plain.latents.shape == made.latents.shape:
        distance = float(relative_l2(made.latents[None], plain.latents[None]))
    level = summarize(psnr(made.frames, plain.frames)).mean
    motion = _motion(plain, made) if plain.is_video else None
    return Way(steps, flops, blocks, seconds, level, similar, distance, motion)


def caption_seen(classifier: FeatureExtractor | None, prompt: str | None, made: Made) -> bool | None:
    """Whether the classifier sees all that the prompt says; `None` without one, or where it knows no word of it."""
    if classifier is None or prompt is None or not classifier.expected(prompt):
        return None
    found = caption_satisfied(made.pictures, [prompt] * len(made.pictures), classifier)["all"]
    return bool(found.satisfied.all())


def _share(answers: Sequence[bool | None]) -> float | None:
    """Share of yes among the answers."""
    given = [answer for answer in answers if answer is not None]
    return fmean(given) if given else None


def _motion(plain: Made, made: Made) -> Motion:
    videos, count = (made.pictures, plain.pictures), plain.pictures.shape[1]
    return Motion(
        worst_frame_psnr=summarize(worst_frame_psnr(*videos)).worst,
        temporal_psnr=summarize(temporal_psnr(*videos)).mean if count >= 2 else None,
        flicker=float(flicker(*videos).mean()) if count >= 3 else None,
    )


def _worst_clip(prompt: str | None, seed: int, plain: Made, accelerated: Made, fewer: Made) -> Clip | None:
    """Of the videos of one item the one that is farthest from plain; `None` for images."""
    if not plain.is_video:
        return None
    worst = summarize(frame_psnr(accelerated.pictures, plain.pictures).mean(dim=1)).worst_index
    return Clip(prompt, seed, *(each.pictures[worst].clone() for each in (plain, accelerated, fewer)))


def _summary(rows: Sequence[tuple[float, Way]]) -> WaySummary:
    ways = [way for _, way in rows]
    similar = [way.ssim for way in ways if way.ssim is not None]
    distances = [way.relative_l2 for way in ways if way.relative_l2 is not None]
    motions = [way.motion for way in ways if way.motion is not None]
    features = [way.feature_distance for way in ways if way.feature_distance is not None]
    return WaySummary(
        steps=fmean(way.steps for way in ways),
        flops_share=fmean(way.flops_share for way in ways),
        compute_share=fmean(way.compute_share for way in ways),
        wall_ratio=median(way.seconds / plain for plain, way in rows),
        psnr=summarize([way.psnr for way in ways]),
        ssim=summarize(similar) if similar else None,
        relative_l2=summarize(distances, larger_is_better=False) if distances else None,
        motion=_motion_summary(motions) if motions else None,
        feature_distance=summarize(features, larger_is_better=False) if features else None,
        satisfied=_share([way.satisfied for way in ways]),
    )


def _motion_summary(motions: Sequence[Motion]) -> MotionSummary:
    changes = [motion.temporal_psnr for motion in motions if motion.temporal_psnr is not None]
    unrest = [motion.flicker for motion in motions if motion.flicker is not None]
    return MotionSummary(
        worst_frame_psnr=summarize([motion.worst_frame_psnr for motion in motions]),
        temporal_psnr=summarize(changes) if changes else None,
        flicker=summarize(unrest, larger_is_better=False) if unrest else None,
    )


def _checked_caller(
    pipe: Any, prompts: Sequence[Any], seeds: Sequence[Any], steps: int, arguments: Any, repeats: int
) -> Caller:
    """Finds everything that can be known to be wrong before any work."""
    caller = Caller(pipe, arguments)
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
    caller.check(prompts)
    return caller
