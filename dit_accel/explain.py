"""Explain: what a policy would do to a pipeline, in words, without generating anything or touching the pipeline."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_accel.attention import BlockSparse
from dit_accel.cache import BlockCache
from dit_accel.cache.schedule import must_compute
from dit_accel.denoiser.find import find_block_lists, find_denoisers
from dit_accel.denoiser.subclass import owner_of
from dit_accel.diffusers_bridge import foreign_attention, foreign_cache, hides_from_counters, is_compiled
from dit_accel.errors import PolicyError, UnsupportedModelError
from dit_accel.forecast import Forecast
from dit_accel.policy import Policy, as_policy
from dit_accel.quantization.plan import is_modulation, shared_sizes
from dit_accel.quantization.quantize import check as check_weights
from dit_accel.stage_plan import why_not
from dit_accel.weights.vector_quant import VectorQuant

_REFERENCES = {
    "anchor": "its value at the last computed step",
    "previous": "its value at the step before",
    "forecast": "its own forecast from the computed steps",
}
_PREDICTORS = {
    "reuse": "the residual of the last computed step, as it is",
    "newton": "a polynomial of degree {order} through the residuals of the last {anchors} computed steps "
    "(Newton's divided differences at their true positions)",
    "hermite": "TaylorSeer's differences on Hermite polynomials, over the last {anchors} computed steps (HiCache)",
    "chebyshev": "Chebyshev polynomials to degree {order}, fitted to the last {anchors} computed steps (Spectrum)",
    "taylor": "TaylorSeer's published formula of order {order} over the last {anchors} computed steps",
}
_COORDINATES = {"step": "the step number", "sigma": "the scheduler's noise level", "log-snr": "its log-SNR"}


def explain(
    target: Any, policy: Policy | str | os.PathLike[str] | Mapping[str, Any] = "balanced", steps: int | None = None
) -> str:
    """What `apply(target, policy)` would find and do over `steps` denoising steps, and what it cannot do and why.

    target: as for `apply`; it is only looked at. A lower bound on cost assumes that every block is called once a step
    and that all blocks form one stack; what is truly called is learned in the first step of a run.
    Raises PolicyError where the policy itself is wrong.
    """
    checked = as_policy(policy)
    if steps is not None and (type(steps) is not int or steps < 1):
        raise PolicyError(f"explain() got steps={steps!r}; give the number of steps as an integer of at least 1.")
    name = f" with {os.fspath(policy)!r}" if isinstance(policy, (str, os.PathLike)) else ""
    lines = [f"{type(target).__name__}{name}"]
    problems: list[str] = []
    denoisers: dict[str, nn.Module] = {}
    try:
        denoisers = find_denoisers(target)
    except UnsupportedModelError as error:
        problems.append(str(error))
    for key, module in denoisers.items():
        lines += _denoiser_lines(key, module)
    lines += _policy_lines(checked)
    if checked.weights is not None and denoisers:
        found, reasons = _weight_lines(target, denoisers, checked.weights)
        lines += found
        problems += reasons
    if checked.cache is not None and checked.skips:
        turns = turns_of(target, denoisers, steps)
        lines += _turn_lines(target, denoisers, turns)
        for key, module in denoisers.items():
            lines += _cost_lines(checked.cache, key, module, steps, turns.get(key))
    problems += _problems(checked, target, denoisers, steps)
    lines.append("Nothing is known to be in the way." if not problems else "In the way:")
    return "\n".join(lines + [f"  {sentence}" for sentence in problems])


def _denoiser_lines(name: str, module: nn.Module) -> list[str]:
    compiled = ", compiled" if is_compiled(module) else ""
    compiled += " (its FLOPs are weighed by parameters)" if hides_from_counters(module) else ""
    lists = find_block_lists(module)
    total = sum(map(len, lists.values()))
    lines = [f"{name}: {type(module).__name__}, {_millions(module)}, {total} blocks in {len(lists)} lists{compiled}"]
    for path, blocks in lists.items():
        kinds = Counter(type(block).__name__ for block in blocks)
        lines.append(f"  {path}: {', '.join(f'{n} x {kind}' for kind, n in kinds.items())}, {_millions(blocks)}")
    return lines


def _policy_lines(policy: Policy) -> list[str]:
    """The policy in words."""
    cache, forecast = policy.cache, policy.predictor
    if not policy.acts_in_steps and policy.weights is not None:
        return ["Every block runs at every step, with quantised weights."]
    if policy.is_exact:
        return ["The policy is exact: every block runs at every step, and the result is that of the plain pipeline."]
    sparse = [] if policy.attention is None or not policy.is_sparse else _attention_lines(policy.attention)
    sparse += [] if policy.resolution is None or not policy.is_staged else [policy.resolution.described()]
    if cache is None or not policy.skips:
        return ["Every block runs at every step.", *sparse]
    lines = [*_scope_lines(cache), *_gate_lines(cache), *sparse]
    limit = "no limit" if cache.max_skips is None else f"at most {cache.max_skips} in a row"
    lines.append(f"  Longest run of skipped steps: {limit}.")
    tail = f" and the last {cache.tail}" if cache.tail else ""
    lines.append(f"  Always computed: the first {max(cache.warmup, 2)} steps of a run{tail}.")
    lines.append(f"  Instead of the skipped blocks: {_stand_in(forecast)}.")
    if forecast.corrector:
        lines.append(
            "  Once a step is computed, the scheduler makes the steps skipped before it again, with a polynomial of "
            f"degree {forecast.corrector} through the outputs on both sides."
        )
    count, plural = forecast.anchors, "" if forecast.anchors == 1 else "s"
    held = f"residual{plural} and probe{plural}" if cache.probe_blocks else f"output{plural} of the model"
    number = "" if count == 1 else f"{count} "
    lines.append(f"  Kept in memory: the last {number}{held}, for each denoiser and guidance branch.")
    return lines


def _attention_lines(attention: BlockSparse) -> list[str]:
    """Which part of the attention is computed, in words."""
    goals = [f"at least {attention.density:.0%} of the key blocks"] if attention.density else []
    goals += [] if attention.top_p is None else [f"as many as hold {attention.top_p:.0%} of the probability"]
    goals += [] if attention.threshold is None else [f"all above a probability of {attention.threshold:g}"]
    kept = f"; always kept: {', '.join(attention.keep)}" if attention.keep else ""
    when = f"every {attention.search_every} steps" if attention.search_every > 1 else "at every step"
    when = f"at steps {_ranges(list(attention.search_steps))}" if attention.search_steps else when
    dense = [f"the first {attention.dense_steps:.0%} of the steps"] if attention.dense_steps else []
    dense += [f"the first {attention.dense_layers:.0%} of the layers"] if attention.dense_layers else []
    dense += [f"sequences below {attention.min_tokens} tokens"] if attention.min_tokens else []
    return [
        f"  Attention: blocks of {attention.block_size} queries see {' and '.join(goals)} (score {attention.score!r}, "
        f"order {attention.order!r}, chosen {when}){kept}.",
        f"  Attention stays dense: {', '.join([*dense, 'cross-attention and what no token grid is known for'])}.",
    ]


def _weight_lines(
    target: Any, denoisers: Mapping[str, nn.Module], settings: VectorQuant
) -> tuple[list[str], list[str]]:
    """What quantised weights save, counted in bfloat16 from shapes alone, and why they cannot be had."""
    try:
        planned = check_weights(target, settings)
    except UnsupportedModelError as error:
        return [], [str(error)]
    lines = []
    for name, formats in planned.items():
        module = denoisers[name]
        whole = 2 * sum(value.numel() for value in module.state_dict().values())
        kinds = Counter((is_modulation(layer), made.codebook) for layer, made in formats.items())
        parts = [f"{n} x {size}{' (modulation)' if mod else ''}" for (mod, size), n in sorted(kinds.items())]
        weights = sum(made.shape[0] * made.shape[1] for made in formats.values())
        shared = sum(2 * math.prod(shape) for shape in shared_sizes(formats).values())
        coded = shared + sum(made.nbytes() for made in formats.values())
        after = whole - 2 * weights + coded
        lines += [
            f"Weights of {name}: {len(formats)} layers, {', '.join(parts)}, found by {settings.method!r}.",
            f"  {weights / 1e6:.1f} million of {whole / 2e6:.1f} million numbers, at {8 * coded / weights:.2f} bits "
            f"each; in bfloat16 {_size(whole)} become {_size(after)}, {whole / after:.1f} times smaller.",
        ]
    return lines, []


def _size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _probe(cache: BlockCache) -> str:
    return "the first block of the stack" if cache.probe_blocks == 1 else f"the first {cache.probe_blocks} blocks"


def _scope_lines(cache: BlockCache) -> list[str]:
    """What runs at every step."""
    if cache.probe_blocks == 0:
        return ["A skipped step calls nothing of the model."]
    ending = "s" if cache.probe_blocks == 1 else ""
    return [f"At every step {_probe(cache)} run{ending}; the rest of the stack may be skipped."]


def _gate_lines(cache: BlockCache) -> list[str]:
    """When is a step skipped."""
    if cache.threshold is None:
        return ["  Skipped: by schedule alone, whatever the model does."]
    if cache.reference == "corrector":
        return [
            "  Skipped: as many steps as lead the sample astray by less than "
            f"{cache.threshold:g} (relative L2), judged by the last correction (Milne's device)."
        ]
    total = "summed over the skipped steps, " if cache.accumulate else ""
    return [
        f"  Skipped: while the residual of {_probe(cache)} differs from {_REFERENCES[cache.reference]} by less than "
        f"{cache.threshold:g} ({total}relative L1)."
    ]


def _stand_in(forecast: Forecast) -> str:
    text = _PREDICTORS[forecast.predictor].format(order=forecast.order, anchors=forecast.anchors)
    return text if forecast.anchors == 1 else f"{text}, over {_COORDINATES[forecast.coordinate]}"


def _turn_lines(target: Any, denoisers: Mapping[str, nn.Module], turns: Mapping[str, range]) -> list[str]:
    """Which denoiser is called when, if there is more than one."""
    if len(denoisers) < 2:
        return []
    first, second = list(denoisers)[:2]
    ratio = _boundary(target, denoisers)
    if isinstance(ratio, float):
        known = f"{first} denoises from boundary_ratio {ratio:g} of the noise upwards and {second} below it"
        if turns:
            known += f": {first} steps {_ranges(list(turns[first]))}, {second} steps {_ranges(list(turns[second]))}"
    elif ratio is None:
        known = "Denoisers may take turns"
    else:
        return [f"The pipeline has no boundary_ratio, so it calls {first} at every step and {second} never."]
    return [f"{known}. Denoisers that take turns each compute first steps of their own."]


def _cost_lines(cache: BlockCache, name: str, module: nn.Module, steps: int | None, turn: range | None) -> list[str]:
    total = sum(map(len, find_block_lists(module).values()))
    if total < cache.probe_blocks + 2 or (turn is not None and not turn):
        return []
    if steps is None:
        if cache.max_skips is None:
            return [f"{name}, over many steps: at least {cache.probe_blocks / total:.1%} of the block calls run."]
        share = (total + cache.max_skips * cache.probe_blocks) / ((cache.max_skips + 1) * total)
        return [f"{name}, over many steps: at least {share:.1%} of the block calls run."]
    skipped, forced = fullest_schedule(cache, steps, turn)
    count = len(turn or range(steps))
    share = 1 - len(skipped) * (total - cache.probe_blocks) / (count * total)
    over = f"over {steps} steps" if count == steps else f"over its {count} of {steps} steps"
    return [
        f"{name}, {over}: steps {_ranges(forced)} are always computed, at most {len(skipped)} are "
        f"skipped, so at least {share:.1%} of the block calls run."
    ]


def _boundary(target: Any, denoisers: Mapping[str, nn.Module]) -> float | bool | None:
    """Wan 2.2's rule: time steps from this share of the trained ones upwards are the first denoiser's, the others the
    second's. False: the pipeline knows the rule and has none; `None`: it does not know it."""
    config = getattr(target, "config", {})
    if list(denoisers) != ["transformer", "transformer_2"] or "boundary_ratio" not in config:
        return None
    ratio = config["boundary_ratio"]
    return False if ratio is None else float(ratio)


def turns_of(target: Any, denoisers: Mapping[str, nn.Module], steps: int | None) -> dict[str, range]:
    """Denoiser name -> the steps that are its own; empty where there is one denoiser, or it is not known."""
    ratio = _boundary(target, denoisers)
    if ratio is None or steps is None:
        return {}
    first, second = denoisers
    if ratio is False:
        return {first: range(steps), second: range(0)}
    scheduler = target.scheduler
    try:
        copied = type(scheduler).from_config(scheduler.config)
        copied.set_timesteps(steps)
    except (TypeError, ValueError):  # one that wants to know more than the number of steps
        return {}
    border = ratio * scheduler.config["num_train_timesteps"]
    noisy = [bool(time >= border) for time in copied.timesteps]
    count = sum(noisy)
    if len(noisy) != steps or not all(noisy[:count]):  # a solver that repeats time steps
        return {}
    return {first: range(count), second: range(count, steps)}


def fullest_schedule(cache: BlockCache, steps: int, turn: range | None = None) -> tuple[list[int], list[int]]:
    """Steps skipped if the indicator never objects, and steps that are computed whatever it says.

    turn: the steps that are this denoiser's, default all. Its first one observes the model and its second one gives the
    first residual, so neither can be skipped.
    """
    skipped: list[int] = []
    forced: list[int] = []
    skips = 0
    for seen, step in enumerate(range(steps) if turn is None else turn):
        reason = must_compute(cache, seen, steps - step, skips)
        if seen < 2 or reason in ("warm-up", "tail"):
            forced.append(step)
        skips = 0 if reason or seen < 2 else skips + 1
        if skips:
            skipped.append(step)
    return skipped, forced


def _problems(policy: Policy, target: Any, denoisers: dict[str, nn.Module], steps: int | None) -> list[str]:
    """Why the policy cannot act, or not as it should; one sentence each."""
    problems: list[str] = []
    foreign = foreign_cache(target, denoisers) if denoisers else None
    if foreign is not None:
        problems.append(f"Another cache is on already: {foreign}.")
    if owner_of(target) is not None:
        problems.append("A session is on this object already; apply() would replace it.")
    problems += [
        f"{name} belongs to a session on another object; call remove() on that session first."
        for name, module in denoisers.items()
        if owner_of(module) is not None and owner_of(module) is not owner_of(target)
    ]
    if policy.is_sparse:
        foreign = {name: foreign_attention(module) for name, module in denoisers.items()}
        problems += [f"The attention of {name} cannot be made sparse: {why}." for name, why in foreign.items() if why]
    if policy.is_staged and (reason := why_not(target, policy.resolution)) is not None:
        problems.append(reason)
    cache = policy.cache
    if cache is None or not policy.skips:
        return problems
    if steps is not None and steps < cache.fewest_steps:
        problems.append(
            f"{steps} steps are too few: with warmup {cache.warmup} and tail {cache.tail} nothing could be skipped; "
            f"give at least {cache.fewest_steps} steps, or lower them."
        )
    for name, turn in turns_of(target, denoisers, steps).items():
        if steps is not None and 0 < len(turn) < steps and not fullest_schedule(cache, steps, turn)[0]:
            problems.append(
                f"{name} gets {len(turn)} of {steps} steps, too few for this policy to skip any; give more steps."
            )
    for name, module in denoisers.items():
        longest = sum(map(len, find_block_lists(module).values()))
        if longest < cache.probe_blocks + 2:
            problems.append(
                f"{name} has {longest} blocks, but with probe_blocks {cache.probe_blocks} it takes "
                f"{cache.probe_blocks + 2} to skip any; lower probe_blocks, or leave the cache out."
            )
    return problems


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M parameters"


def _ranges(numbers: list[int]) -> str:
    """ "0 to 2 and 49" for 0, 1, 2, 49."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return " and ".join(words) or "none"
