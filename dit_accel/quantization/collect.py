"""Collect: model calls of plain runs, and what the layers see in them: the data of every calibrated method.

Runs start from noise and follow the dense model's own path, so no data set is needed (VQ4DiT's zero-data calibration).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.calls import Caller
from dit_accel.denoiser.samples import stacked
from dit_accel.denoiser.whole import tensors_in
from dit_accel.errors import ArgumentError
from dit_accel.weights.vector_quant import Calibrate

FIRST_SEED = 1_000_000  # of calibration runs: far from those that anybody looks at
_FEATURES = 4096  # values of an output that calls are told apart by


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a denoiser as it was made. args, kwargs: its own, tensors on their device. output: of the dense
    model, the tensors in the order of its result. run, step: which."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: tuple[Tensor, ...]
    run: int
    step: int


@dataclass
class _Recorder:
    """Keeps the calls of one denoiser in one run; equal tensors of several steps, such as embeddings, are kept once."""

    run: int = 0
    calls: list[Call] = field(default_factory=list)
    known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # id -> (given, kept)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        del module
        output = tuple(tensor.detach().clone() for tensor in tensors_in(result))
        self.calls.append(Call(self._kept(args), self._kept(kwargs), output, self.run, len(self.calls)))

    def _kept(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            given, kept = self.known.get(id(value), (None, None))
            if kept is None or given is not value or not torch.equal(kept, value):
                kept = value.detach().clone()
                self.known[id(value)] = (value, kept)
            return kept
        if isinstance(value, Mapping):
            return {key: self._kept(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self._kept(item) for item in value)
        return value


def collect_calls(
    pipe: Any,
    denoisers: Mapping[str, nn.Module],
    settings: Calibrate,
    *,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Call]]:
    """Name of each denoiser -> the calls that are kept of it, from `settings.runs` plain runs of the pipeline.

    arguments: of the pipeline's call. progress: called with runs done and runs in all.
    """
    caller = Caller(pipe, arguments)
    prompts = prompts_for(caller, settings)
    caller.check(prompts)
    kept: dict[str, list[Call]] = {name: [] for name in denoisers}
    for run in range(settings.runs):
        recorders = {name: _Recorder(run) for name in denoisers}
        handles = [
            module.register_forward_hook(recorders[name], with_kwargs=True) for name, module in denoisers.items()
        ]
        try:
            caller.make(prompts[run % len(prompts)], FIRST_SEED + 1000 * seed + run, settings.steps)
        except (AttributeError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"{type(pipe).__name__} cannot be run for its calibration: {error}. Give the arguments of its call "
                "with apply(..., arguments={...}), or the method 'data-free'."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        for name, recorder in recorders.items():
            quota = (run + 1) * settings.calls // settings.runs - run * settings.calls // settings.runs
            choose = diverse if settings.choice == "diverse" else spread
            kept[name] += choose(recorder.calls, quota, run)
        if progress is not None:
            progress(run + 1, settings.runs)
    for name, calls in kept.items():
        if not calls:
            raise ArgumentError(f"{type(pipe).__name__} never called {name}, so there is nothing to calibrate it on.")
    return kept


def prompts_for(caller: Caller, settings: Calibrate) -> Sequence[str | None]:
    """The prompts of the settings; without any: nothing where the pipeline needs none, classes in turn, or ''."""
    if settings.prompts:
        return settings.prompts
    if "class_labels" in caller.parameters:
        labels = getattr(caller.pipe, "labels", None) or {}
        return [str(number) for number in sorted(labels.values())] or ["0"]
    embedded = any(name.startswith("prompt_embeds") for name in caller.arguments)
    return [""] if "prompt" in caller.parameters and not embedded else [None]


def spread(calls: Sequence[Call], count: int, run: int) -> list[Call]:
    """As many calls, evenly spread over those of a run; the first one moves from run to run (golden section)."""
    count = min(count, len(calls))
    if not count:
        return []
    start = (run * 0.6180339887498949) % 1.0
    return [calls[int((number + start) * len(calls) / count)] for number in range(count)]


def diverse(calls: Sequence[Call], count: int, run: int) -> list[Call]:
    """As many calls whose outputs are near many others and far from those chosen before (EDA-DM 2401.04585).

    Each is worth its mean likeness (cosine) to all, less its likeness to the nearest chosen one.
    """
    del run
    count = min(count, len(calls))
    if not count:
        return []
    features = torch.stack([_feature(call) for call in calls])
    alike = features @ features.T
    density, nearest = alike.mean(1), torch.zeros(len(calls))
    chosen: list[int] = []
    for _ in range(count):
        worth = density - nearest
        worth[chosen] = -torch.inf
        chosen.append(int(worth.argmax()))
        nearest = torch.maximum(nearest, alike[chosen[-1]])
    return [calls[number] for number in sorted(chosen)]


def _feature(call: Call) -> Tensor:
    flat = torch.cat([tensor.flatten() for tensor in call.output]).float().cpu()
    sample = flat[:: max(1, len(flat) // _FEATURES)]
    return sample / sample.norm().clamp(min=1e-12)


def joined(calls: Sequence[Call]) -> Call:
    """The calls as one with all their rows. Raises ValueError where they cannot be joined."""
    count = calls[0].output[0].shape[0]
    args, kwargs = (stacked(values, count) for values in ([c.args for c in calls], [c.kwargs for c in calls]))
    outputs = tuple(torch.cat(rows) for rows in zip(*(call.output for call in calls), strict=True))
    return Call(args, kwargs, outputs, calls[0].run, calls[0].step)


@torch.no_grad()
def can_be_joined(model: nn.Module, calls: Sequence[Call]) -> bool:
    """True where a call with the rows of several gives the outputs of each: found out on the model itself."""
    try:
        whole = joined(calls)
        made = tensors_in(model(*whole.args, **whole.kwargs))
        errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(made, whole.output)]
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError):
        return False
    return max(errors) < 1e-2  # as near as half precision comes


class _Enough(Exception):
    """Raised inside a forward pass once all that was wanted of it has been seen."""


@contextlib.contextmanager
def watching(
    layers: Mapping[str, nn.Module], see: Callable[[str, Any, dict[str, Any], Any], None], stop_after: int | None = None
) -> Iterator[None]:
    """Tell `see` of every call of these layers (name, args, kwargs, result); leaves the forward after so many calls."""
    seen = 0

    def hook(name: str) -> Callable[..., None]:
        def call(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
            nonlocal seen
            del module
            see(name, args, kwargs, result)
            seen += 1
            if seen == stop_after:
                raise _Enough

        return call

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def order_of(model: nn.Module, layers: Mapping[str, nn.Module], call: Call) -> list[str]:
    """Names of these layers in the order that a call of the model reaches them, as often as it does."""
    order: list[str] = []
    with watching(layers, lambda name, *_: order.append(name)):
        model(*call.args, **call.kwargs)
    return order


@torch.no_grad()
def collect_hessians(
    model: nn.Module, layers: Mapping[str, nn.Module], calls: Sequence[Call], reached: int
) -> dict[str, Tensor]:
    """H = E[x^T x] of the inputs of each layer -> float32 [I, I]. reached: calls of these layers in one forward."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        del kwargs, result
        rows = args[0].reshape(-1, args[0].shape[-1]).float()
        if name not in sums:
            sums[name], counts[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device), 0
        sums[name].addmm_(rows.T, rows)
        counts[name] += len(rows)

    for call in calls:
        with watching(layers, see, reached):
            model(*call.args, **call.kwargs)
    return {name: total / counts[name] for name, total in sums.items()}
