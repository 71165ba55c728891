"""Dynamics: how the blocks' outputs change over the steps, and how well past steps forecast them, trained and random.

    python -m dit_accel.bench.dynamics pipelines/tiny-flux --out pipelines/tiny-flux/results

Everything that a cache can gain lies in these curves. The same architecture with random weights is measured beside the
trained one, because it behaves otherwise: what holds only there is no evidence.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dit_accel.bench.measure import Workload, carrier, load_workload, tensors
from dit_accel.bench.results import png_of, versions
from dit_accel.cache.indicator import relative_l1
from dit_accel.denoiser.find import find_block_lists, find_denoisers
from dit_accel.errors import UnsupportedModelError
from dit_accel.files import write_atomically
from dit_accel.forecast.weights import newton_weights
from dit_accel.testing.tiny_transformers import redraw

INTERVALS = (2, 3, 5)
ORDERS = (0, 1, 2)


@dataclass(frozen=True)
class Trace:
    """One branch of one run. change [S-1, L]: relative L1 of each block's output against the step before;
    head, stack [S, ...]: residual of the first block, and of all blocks together."""

    change: Tensor
    head: Tensor
    stack: Tensor


@dataclass(frozen=True)
class Dynamics:
    """Means over items and branches.

    block_change [S-1][L], relative L1 against the step before; stack_change, head_change [S-1], the same of residuals;
    forecast_error["every 3rd, order 1"]: relative L1 error of the stack residual at the steps in between;
    head_stack_correlation: Pearson, over the steps, of head_change with stack_change.
    """

    blocks: int
    branches: int
    block_change: list[list[float]]
    head_change: list[float]
    stack_change: list[float]
    forecast_error: dict[str, float]
    head_stack_correlation: float


class Recorder:
    """Hooks on every block of one denoiser; keeps what the traces need, on the CPU, in float32."""

    def __init__(self, denoiser: nn.Module):
        self.calls: list[tuple[list[Tensor], Tensor, Tensor]] = []  # outputs of all blocks, head, stack
        self.handles = []
        self.order: list[nn.Module] = []
        for blocks in find_block_lists(denoiser).values():
            for block in blocks:
                self.handles.append(block.register_forward_hook(self._after, with_kwargs=True))
        self.handles.append(denoiser.register_forward_pre_hook(self._begin))
        self.handles.append(denoiser.register_forward_hook(self._end))
        self._begin()

    def _begin(self, *_: Any) -> None:
        self.outputs: list[Tensor] = []
        self.first: Tensor | None = None

    def _after(self, block: nn.Module, inputs: Any, named: dict[str, Any], result: Any) -> None:
        del block
        output = carrier([result])
        if self.first is None:
            same = [x for x in tensors([*inputs, *named.values()]) if x.shape == output.shape]
            if not same:
                raise UnsupportedModelError("dynamics cannot tell which input of the first block its output replaces.")
            self.first = same[0].detach().float().cpu()
        self.outputs.append(output.detach().float().cpu())

    def _end(self, *_: Any) -> None:
        assert self.first is not None
        last = [x for x in self.outputs if x.shape == self.first.shape][-1]
        self.calls.append((self.outputs, self.outputs[0] - self.first, last - self.first))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def traces(self, steps: int) -> list[Trace]:
        """One trace a branch. A step makes as many calls as there are branches."""
        branches, rest = divmod(len(self.calls), steps)
        if rest:
            raise UnsupportedModelError(
                f"dynamics saw {len(self.calls)} denoiser calls in {steps} steps; use a scheduler that makes equally "
                "many at each."
            )
        found = []
        for branch in range(branches):
            calls = self.calls[branch::branches]
            change = [
                [float(relative_l1(now, before)) for now, before in zip(later, earlier)]
                for (earlier, _, _), (later, _, _) in itertools.pairwise(calls)
            ]
            heads = torch.stack([head for _, head, _ in calls])
            stacks = torch.stack([stack for _, _, stack in calls])
            found.append(Trace(torch.tensor(change), heads, stacks))
        return found


def forecast_error(stack: Tensor, interval: int, order: int) -> float:
    """Relative L1 error at the steps between anchors, forecast from every `interval`-th of the residuals [S, ...]."""
    errors = []
    for step in range(interval * max(ORDERS) + 1, len(stack)):  # the same steps for every order
        if step % interval == 0:
            continue
        anchors = list(range(0, step, interval))[-(order + 1) :]
        weights = newton_weights([float(anchor) for anchor in anchors], float(step), order)
        guess = sum((w * stack[anchor] for w, anchor in zip(weights, anchors)), torch.zeros_like(stack[0]))
        errors.append(float(relative_l1(guess, stack[step])))
    return fmean(errors)


def summarise(traces: Sequence[Trace], branches: int) -> Dynamics:
    """Means over traces."""

    def change(series: Tensor) -> Tensor:
        return torch.tensor([relative_l1(b, a) for a, b in itertools.pairwise(series)])

    heads, stacks = (torch.stack([change(getattr(trace, name)) for trace in traces]) for name in ("head", "stack"))
    correlation = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(heads, stacks)]
    errors = {
        f"every {interval}, order {order}": fmean(forecast_error(trace.stack, interval, order) for trace in traces)
        for interval in INTERVALS
        for order in ORDERS
    }
    return Dynamics(
        blocks=traces[0].change.shape[1],
        branches=branches,
        block_change=torch.stack([trace.change for trace in traces]).mean(0).tolist(),
        head_change=heads.mean(0).tolist(),
        stack_change=stacks.mean(0).tolist(),
        forecast_error=errors,
        head_stack_correlation=fmean(correlation),
    )


def observe(workload: Workload, items: int) -> dict[str, Dynamics]:
    """Denoiser name -> dynamics, from plain runs of the first items at full steps."""
    traces: dict[str, list[Trace]] = {}
    branches: dict[str, int] = {}
    for item in tqdm(range(items), desc="dynamics", leave=False, disable=None):
        with contextlib.ExitStack() as stack:
            recorders = {name: Recorder(module) for name, module in find_denoisers(workload.pipe).items()}
            for recorder in recorders.values():
                stack.callback(recorder.remove)
            workload.image(item, workload.steps)
        for name, recorder in recorders.items():
            own = recorder.traces(workload.steps)
            branches[name] = len(own)
            traces.setdefault(name, []).extend(own)
    return {name: summarise(own, branches[name]) for name, own in traces.items() if own}


@contextlib.contextmanager
def random_weights(pipe: Any, seed: int = 0) -> Iterator[None]:
    """Put random weights into every denoiser, no layer at zero; afterwards the trained ones, bit for bit."""
    kept = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in find_denoisers(pipe).items()}
    try:
        for module in find_denoisers(pipe).values():
            torch.manual_seed(seed)
            fresh = type(module).from_config(module.config)  # type: ignore[attr-defined]
            redraw(fresh, seed)
            module.load_state_dict(fresh.state_dict())
        yield
    finally:
        for name, module in find_denoisers(pipe).items():
            module.load_state_dict(kept[name])


# --------------------------------------------------------------------------------------------------------- the report


def markdown(name: str, kinds: dict[str, Dynamics]) -> str:
    """A table of what matters, one column a kind of weights."""
    lines = [f"| {name} | " + " | ".join(kinds) + " |", "|---" * (1 + len(kinds)) + "|"]

    def row(title: str, value: Callable[[Dynamics], str]) -> None:
        lines.append(f"| {title} | " + " | ".join(value(kind) for kind in kinds.values()) + " |")

    def three(curve: list[float]) -> str:
        tenth = max(1, len(curve) // 10)
        return f"{fmean(curve[:tenth]):.3f} / {min(curve):.3f} / {fmean(curve[-tenth:]):.3f}"

    row("change of a block's output a step: first tenth / least / last tenth", lambda d: three(mean_change(d)))
    row("change of the stack's residual, likewise", lambda d: three(d.stack_change))
    for interval in INTERVALS:
        title = f"forecast error of the stack's residual, every {interval} steps, order 0 / 1 / 2"
        row(title, lambda d, n=interval: " / ".join(f"{d.forecast_error[f'every {n}, order {o}']:.3f}" for o in ORDERS))
    row("correlation of the first block's change with the stack's", lambda d: f"{d.head_stack_correlation:.2f}")
    return "\n".join(lines)


def mean_change(dynamics: Dynamics) -> list[float]:
    """Mean over the blocks of their change at each step."""
    return [fmean(step) for step in dynamics.block_change]


def plot(name: str, kinds: dict[str, Dynamics]) -> bytes:
    """PNG: a map of blocks by steps for each kind of weights, and the curves below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(kinds), figsize=(5.5 * len(kinds), 7), squeeze=False)
    for column, (kind, dynamics) in enumerate(kinds.items()):
        change = torch.tensor(dynamics.block_change).T
        top, bottom = axes[0][column], axes[1][column]
        image = top.imshow(change.clamp_max(change.quantile(0.98)), aspect="auto", origin="lower", cmap="cividis")
        figure.colorbar(image, ax=top, label="relative L1 change")
        top.set(title=f"{name}, {kind}", xlabel="step", ylabel="block")
        for label, curve in (("first block's residual", dynamics.head_change), ("stack", dynamics.stack_change)):
            bottom.plot(range(1, len(curve) + 1), curve, label=label)
        bottom.plot(range(1, len(change[0]) + 1), mean_change(dynamics), label="blocks' outputs, mean", linestyle="--")
        bottom.set(xlabel="step", ylabel="relative L1 change", yscale="log")
        bottom.grid(alpha=0.3)
        bottom.legend(fontsize=8)
    return png_of(figure, dpi=90)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", type=Path, nargs="+", help="folders of trained pipelines")
    parser.add_argument("--items", type=int, default=8, help="prompts, item i with seed i")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, help="default: the one in dit_accel_defaults.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: PIPELINE/results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    for folder in arguments.pipelines:
        workload = load_workload(folder, arguments.steps, arguments.guidance)
        trained = observe(workload, arguments.items)
        with random_weights(workload.pipe):
            random = observe(workload, arguments.items)
        out = arguments.out or folder / "results"
        out.mkdir(parents=True, exist_ok=True)
        for name, dynamics in trained.items():
            kinds = {"trained": dynamics, "random": random[name]}
            title = folder.name if len(trained) == 1 else f"{folder.name}, {name}"
            stem = "dynamics" if len(trained) == 1 else f"dynamics-{name}"
            table = markdown(title, kinds)
            print(table, flush=True)
            about = {
                "command": f"python -m dit_accel.bench.dynamics {folder}",
                "date": time.strftime("%Y-%m-%d"),
                "versions": versions(),
                "items": arguments.items,
                "steps": arguments.steps,
                "guidance": workload.guidance,
            }
            record = about | {kind: asdict(found) for kind, found in kinds.items()}
            write_atomically(out / f"{stem}.json", json.dumps(rounded(record), indent=1) + "\n")
            write_atomically(out / f"{stem}.png", plot(title, kinds))
    return 0


def rounded(value: Any) -> Any:
    """Floats to five digits, and lists of numbers on few lines: the curves are to be read, not to be exact."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    raise SystemExit(main())
