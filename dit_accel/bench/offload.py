"""Offload: is a skipped block loaded, how many bytes of features are held, and what does a call take, while weights lie
elsewhere; ours beside cache-dit and diffusers' own caches.

python -m dit_accel.bench.offload --out docs/results

Everything on the CPU, where offloading to disk is what really takes weights away. Loads are counted at the functions of
diffusers and accelerate that bring weights in, blocks at the first layer inside them. Features held: all
tensors that a call has made and Python can reach at the end of a step, less those of the plain pipeline at that step.
Random weights: nothing here is about quality.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from accelerate import disk_offload
from accelerate.utils import OffloadedWeightsLoader
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor

import dit_accel
from dit_accel import BlockCache, Forecast, Policy
from dit_accel.bench.compile import METHODS as COMPILED
from dit_accel.bench.compile import MODEL, STACK, call, pipeline
from dit_accel.bench.methods import Attach, cache_dit, diffusers_cache
from dit_accel.bench.results import failure, versions
from dit_accel.cache import Signal
from dit_accel.files import write_atomically
from dit_accel.session import Session

MIB = 2**20
CPU = torch.device("cpu")
NEWTON = Forecast("newton", order=1)
OURS = {
    "ours, blocks skipped": STACK,
    "ours, blocks skipped, kept on the host": replace(STACK, forecast=replace(NEWTON, storage="host")),
    "ours, blocks skipped, kept in bfloat16": replace(STACK, forecast=replace(NEWTON, storage="half")),
    "ours, blocks skipped, reused": replace(STACK, forecast=Forecast("reuse", order=0)),
    "ours, decided inside the first block": Policy(
        BlockCache(threshold=9.0, signal=Signal("modulated"), probe_blocks=0, max_skips=1, warmup=2, tail=1), NEWTON
    ),
    "ours, whole steps skipped": MODEL,
    "ours, whole steps skipped, kept in bfloat16": replace(MODEL, forecast=replace(NEWTON, storage="half")),
}
STEADY = {"residual_diff_threshold": 9.0, "max_continuous_cached_steps": 1, "max_warmup_steps": 2}
RIVALS: dict[str, Attach] = {
    "plain": COMPILED["plain"],
    "cache-dit F1B0": COMPILED["cache-dit F1B0"],
    "cache-dit F1B0, Taylor 1": cache_dit("taylor", **STEADY),
    # It has no other way to skip every second step than a threshold; this one skips 4 of 10 at the default size.
    "diffusers FirstBlockCache": diffusers_cache(lambda: diffusers.FirstBlockCacheConfig(threshold=0.69)),
    "diffusers TaylorSeer": COMPILED["diffusers TaylorSeer"],
    "diffusers TaylorSeer lite": diffusers_cache(
        lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2, max_order=1, use_lite_mode=True)
    ),
}
METHODS = ("plain", *OURS, *tuple(RIVALS)[1:])
WIDELY = (
    "plain",
    "ours, blocks skipped",
    "ours, whole steps skipped",
    "cache-dit F1B0",
    "diffusers FirstBlockCache",
    "diffusers TaylorSeer",
    "diffusers TaylorSeer lite",
)
ORDERS = ("offload first", "method first")


def attach(method: str, pipe: Any) -> tuple[Session | None, Callable[[], None]]:
    """Switch a method on -> the session where it is ours, and how to switch it off."""
    if method in OURS:
        session = dit_accel.apply(pipe, OURS[method])
        return session, session.remove
    return None, RIVALS[method](pipe)


# ---------------------------------------------------------------------------------------------------- ways to offload


def groups(pipe: Any, **options: Any) -> None:
    """diffusers' group offload of the transformer."""
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)


def on_disk(pipe: Any, folder: str) -> None:
    """accelerate's sequential offload, to disk; of the VAE too, since a pipeline goes by the hooks on all its parts."""
    for name in ("transformer", "vae"):
        disk_offload(getattr(pipe, name), f"{folder}/{name}", execution_device=CPU)


DISK = "blocks, on disk"  # the way that all methods are tried in; the others are for `WIDELY`
BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}
WAYS: dict[str, Callable[[Any, str], None]] = {
    "none": lambda pipe, folder: None,
    DISK: lambda pipe, folder: groups(pipe, **BLOCKS, offload_to_disk_path=folder),
    "blocks, in memory": lambda pipe, folder: groups(pipe, **BLOCKS),
    "accelerate, leaves on disk": on_disk,
    "accelerate, model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "accelerate, leaves in memory": lambda pipe, folder: pipe.enable_sequential_cpu_offload(device="cpu"),
    "blocks, prefetched": lambda pipe, folder: groups(pipe, **BLOCKS, use_stream=True),
}
TIMED = ("none", DISK)


# ------------------------------------------------------------------------------------------------------------- counts


@dataclass(frozen=True)
class Loads:
    """One call of one method in one way, switched on in one order.

    ran: block calls that ran, at least in part; loaded: block calls of which any weight was loaded; spare: of these,
    those that did not run; missed: of those that ran, those that were not loaded; outside: loads of weights that are in
    no block; inside_mib, outside_mib: bytes of all loads in MiB; at_once_mib: of block weights, the most that was there
    at one time, and left_mib: at the end of a step (diffusers' groups; others are not seen to go); apart: relative L2
    distance to the same method without offload, None where that is not finite; error: what was said where it does not
    run.
    """

    method: str
    way: str
    order: str
    ran: int = 0
    loaded: int = 0
    spare: int = 0
    missed: int = 0
    outside: int = 0
    inside_mib: float = 0.0
    outside_mib: float = 0.0
    at_once_mib: float = 0.0
    left_mib: float = 0.0
    apart: float | None = None
    error: str = ""


class Watch:
    """Counts what the blocks of a transformer do and what is loaded, step by step."""

    def __init__(self, transformer: Any):
        lists = ("transformer_blocks", "single_transformer_blocks")
        self.blocks = {f"{name}.{i}": b for name in lists for i, b in enumerate(getattr(transformer, name))}
        self.owners = {module: name for name, block in self.blocks.items() for module in block.modules()}
        self.clear()
        for name, block in self.blocks.items():
            first = next(module for module in block.modules() if isinstance(module, torch.nn.Linear))
            first.register_forward_pre_hook(partial(self._note_run, name))

    def clear(self) -> None:
        """Begin to count."""
        self.step = self.outside = self.inside_bytes = self.outside_bytes = self.at_once = self.left = 0
        self.ran: set[tuple[int, str]] = set()
        self.loaded: set[tuple[int, str]] = set()
        self.held: dict[ModuleGroup, int] = {}

    def _note_run(self, block: str, module: Any, inputs: Any) -> None:
        del module, inputs
        self.ran.add((self.step, block))

    def next_step(self, pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """What a pipeline calls at the end of a step."""
        del pipe, time
        self.step, self.left = step + 1, max(self.left, sum(self.held.values()))
        return tensors

    def note_load(self, block: str | None, size: int) -> None:
        """block: `None` for weights outside of the blocks; size: in bytes."""
        if block is None:
            self.outside, self.outside_bytes = self.outside + 1, self.outside_bytes + size
        else:
            self.loaded.add((self.step, block))
            self.inside_bytes += size

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """See every load by diffusers' groups and by accelerate's map of weights."""
        onload, offload, read = ModuleGroup.onload_, ModuleGroup.offload_, OffloadedWeightsLoader.__getitem__

        def seen_onload(group: ModuleGroup) -> None:
            owner = None if group.onload_leader is None else self.owners.get(group.onload_leader)
            size = sum(tensor.nbytes for tensor in tensors_of(group))
            self.note_load(owner, size)
            if owner is not None:
                self.held[group] = size
                self.at_once = max(self.at_once, sum(self.held.values()))
            onload(group)

        def seen_offload(group: ModuleGroup) -> None:
            self.held.pop(group, None)
            offload(group)

        def seen_read(weights: OffloadedWeightsLoader, key: str) -> Any:
            value = read(weights, key)
            owner = ".".join(key.split(".")[:2])
            self.note_load(owner if owner in self.blocks else None, value.nbytes)
            return value

        with (
            mock.patch.object(ModuleGroup, "onload_", seen_onload),
            mock.patch.object(ModuleGroup, "offload_", seen_offload),
            mock.patch.object(OffloadedWeightsLoader, "__getitem__", seen_read),
        ):
            yield


def tensors_of(group: ModuleGroup) -> list[Tensor]:
    """Everything that a group loads."""
    inside = [tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())]
    return list(dict.fromkeys([*inside, *group.parameters, *group.buffers]))  # some stand in two of these


def count(method: str, way: str, order: str, arguments: argparse.Namespace, wanted: Tensor | None = None) -> Loads:
    """One call on a new pipeline. wanted: what the same method gives without offload."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        try:
            pipe, watch, detach = entered(method, way, order, arguments, folder)
            undo.callback(detach)
            undo.enter_context(watch.counting())
            watch.clear()
            _, made = call(partial(pipe, callback_on_step_end=watch.next_step), arguments.side, arguments.steps)
        except Exception as error:  # a way may not exist on a CPU, a rival may break in it, which is what is asked here
            return Loads(method, way, order, error=failure(error))
    apart = 0.0 if wanted is None else float((made - wanted).norm() / wanted.norm())
    return Loads(
        method,
        way,
        order,
        ran=len(watch.ran),
        loaded=len(watch.loaded),
        spare=len(watch.loaded - watch.ran),
        missed=len(watch.ran - watch.loaded) if watch.loaded else 0,
        outside=watch.outside,
        inside_mib=round(watch.inside_bytes / MIB, 1),
        outside_mib=round(watch.outside_bytes / MIB, 1),
        at_once_mib=round(watch.at_once / MIB, 1),
        left_mib=round(watch.left / MIB, 1),
        apart=apart if math.isfinite(apart) else None,
    )


def entered(
    method: str, way: str, order: str, arguments: argparse.Namespace, folder: str
) -> tuple[Any, Watch, Callable[[], None]]:
    """A new pipeline with a method and a way of offload on it, and how to switch the method off."""
    pipe = pipeline(arguments.width, arguments.double, arguments.single)
    watch = Watch(pipe.transformer)
    if order == "offload first":
        WAYS[way](pipe, folder)
    _, detach = attach(method, pipe)
    if order == "method first":
        WAYS[way](pipe, folder)
    return pipe, watch, detach


def counts(arguments: argparse.Namespace) -> list[Loads]:
    """Every method in every way and order; a way that the plain pipeline does not run in is asked of it alone."""
    rows: list[Loads] = []
    impossible = set()
    for method in METHODS:
        pipe = pipeline(arguments.width, arguments.double, arguments.single)
        _, detach = attach(method, pipe)
        _, wanted = call(pipe, arguments.side, arguments.steps)
        detach()
        ways = [way for way in WAYS if way != "none" and way not in impossible]
        for way in ways if method in WIDELY else [DISK]:
            for order in ORDERS if method != "plain" else ORDERS[:1]:
                rows.append(count(method, way, order, arguments, wanted))
                print(rows[-1], flush=True)
                if method == "plain" and rows[-1].error:
                    impossible.add(way)
    return rows


# -------------------------------------------------------------------------------------------------------------- state


@dataclass(frozen=True)
class Held:
    """Features that a method holds from step to step, in bytes, the most at the end of any step.

    seen: in all live tensors that the call has made, above the plain pipeline's; counted: by our session, at the end of
    its denoiser calls; put_away: of these, what the policy's storage has cast or moved, None for rivals.
    """

    method: str
    seen: int
    counted: int | None = None
    put_away: int | None = None
    error: str = ""


def live_bytes() -> int:
    """Bytes of all tensors that Python has made since `gc.freeze` and can reach; shared memory is counted once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and item.device.type != "meta"]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def growth(method: str, arguments: argparse.Namespace) -> tuple[list[int], Session | None, int]:
    """Bytes of new tensors that live at the end of each step; the session; the most bytes that were put away."""
    pipe = pipeline(arguments.width, arguments.double, arguments.single)
    session, detach = attach(method, pipe)
    grown, away = [], [0]

    def note(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del pipe, step, time
        grown.append(live_bytes())
        run = None if session is None else session.active_run()
        anchors = [] if run is None else [a for b in run.branches.values() for unit in b.units.values() for a in unit]
        values = [value for anchor in anchors if anchor.kinds for value in anchor.values if value is not None]
        away.append(sum(value.nbytes for value in values))
        return tensors

    gc.collect()
    gc.freeze()
    try:
        call(partial(pipe, callback_on_step_end=note), arguments.side, arguments.steps)
    finally:
        gc.unfreeze()
    detach()  # cache-dit keeps what it holds until then, and the next method would be seen to give it back
    return grown, session, max(away)


def states(arguments: argparse.Namespace) -> list[Held]:
    """What every method holds, without offload."""
    plain, _, _ = growth("plain", arguments)
    rows = []
    for method in METHODS[1:]:
        try:
            grown, session, away = growth(method, arguments)
        except Exception as error:  # as above
            rows.append(Held(method, 0, error=failure(error)))
            continue
        seen = max(own - other for own, other in zip(grown, plain, strict=True))
        own = (None, None) if session is None else (session.stats.state_bytes, away)
        rows.append(Held(method, seen, *own))
        print(rows[-1], flush=True)
    return rows


# --------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Speed:
    """seconds: CPU time of a call, median; speed_up: over the plain pipeline in the same way, median of the ratios
    within a round."""

    method: str
    way: str
    order: str
    seconds: float
    speed_up: float


def is_right(row: Loads) -> bool:
    """True where offload has not changed the result by more than how products are summed."""
    return not row.error and row.apart is not None and row.apart < 1e-3


def best_order(method: str, way: str, rows: Sequence[Loads]) -> str | None:
    """The order that loads fewest blocks among those that give the right result; None where neither does."""
    right = [row for row in rows if (row.method, row.way) == (method, way) and is_right(row)]
    return min(right, key=lambda row: row.loaded).order if right else None


def times(rows: Sequence[Loads], arguments: argparse.Namespace) -> list[Speed]:
    """All arms in turn, as often as there are rounds, on a pipeline of their own each; one uncounted call before."""
    with tempfile.TemporaryDirectory() as folder:
        arms: dict[tuple[str, str], tuple[str, Any]] = {}
        for way in TIMED:
            for method in METHODS:
                order = ORDERS[0] if way == "none" else best_order(method, way, rows)
                if order is not None:
                    own = f"{folder}/{len(arms)}"
                    Path(own).mkdir()
                    arms[method, way] = order, entered(method, way, order, arguments, own)[0]
                    call(arms[method, way][1], arguments.side, arguments.steps)
        rounds: list[dict[tuple[str, str], float]] = []
        for number in range(arguments.rounds):
            turn = list(arms)[:: 1 if number % 2 == 0 else -1]  # what comes late in one round comes early in the next
            rounds.append({arm: call(arms[arm][1], arguments.side, arguments.steps)[0] for arm in turn})
    return [
        Speed(
            method,
            way,
            order,
            round(statistics.median(one[method, way] for one in rounds), 3),
            round(statistics.median(one["plain", way] / one[method, way] for one in rounds), 3),
        )
        for (method, way), (order, _) in arms.items()
    ]


# -------------------------------------------------------------------------------------------------------------- tables


def text(loads: Sequence[Loads], held: Sequence[Held], speeds: Sequence[Speed]) -> str:
    """The tables in Markdown."""
    tables = _loads_table(loads), _ways_table(loads), _held_table(held), _time_table(speeds)
    return "\n\n".join("\n".join(lines) for lines in tables) + "\n"


def _loads_table(rows: Sequence[Loads]) -> list[str]:
    """One line for each method: what ran and was loaded with blocks on disk, in either order."""
    lines = [
        "| method | block calls that ran | blocks loaded, offload first | blocks loaded, method first "
        "| weights read, MiB | left loaded between steps, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        both = _both(rows, method, DISK)
        ran, read, left = (
            " / ".join(dict.fromkeys(f"{value(row):.0f}" for row in both.values() if not row.error))
            for value in (lambda r: r.ran, lambda r: r.inside_mib + r.outside_mib, lambda r: r.left_mib)
        )
        cells = [_loaded(both[order]) if order in both else "" for order in ORDERS]
        lines.append(f"| {method} | {ran} | {' | '.join(cells)} | {read} | {left} |")
    return lines


def _ways_table(rows: Sequence[Loads]) -> list[str]:
    """One line for each method: blocks loaded in the other ways, both orders where they differ."""
    methods = [method for method in dict.fromkeys(row.method for row in rows) if method in WIDELY]
    ways = [way for way in dict.fromkeys(row.way for row in rows) if way != DISK]
    lines = [f"| method | {' | '.join(ways)} |", "|---|" + "---|" * len(ways)]
    for method in methods:
        cells = [" / ".join(dict.fromkeys(map(_loaded, _both(rows, method, way).values()))) for way in ways]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _both(rows: Sequence[Loads], method: str, way: str) -> dict[str, Loads]:
    """The rows of one method in one way, by their order."""
    return {row.order: row for row in rows if (row.method, row.way) == (method, way)}


def _loaded(row: Loads) -> str:
    if row.error:
        return f"fails: {row.error[:80]}"
    return f"{row.loaded}" if is_right(row) else f"{row.loaded}, **wrong result**"


def _held_table(rows: Sequence[Held]) -> list[str]:
    lines = ["| method | features held, KiB | counted by the session | cast or moved |", "|---|---|---|---|"]
    for row in rows:
        own = ["" if size is None else f"{size / 1024:.0f}" for size in (row.counted, row.put_away)]
        seen = f"fails: {row.error}" if row.error else f"{row.seen / 1024:.0f}"
        lines.append(f"| {row.method} | {seen} | {' | '.join(own)} |")
    return lines


def _time_table(rows: Sequence[Speed]) -> list[str]:
    lines = ["| method | " + " | ".join(f"{way}: seconds, times as fast" for way in TIMED) + " |"]
    lines.append("|---|" + "---|" * len(TIMED))
    found = {(row.method, row.way): row for row in rows}
    for method in dict.fromkeys(row.method for row in rows):
        own = [found.get((method, way)) for way in TIMED]
        cells = ["" if row is None else f"{row.seconds:.2f}, {row.speed_up:.2f}" for row in own]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--side", type=int, default=32, help="of the picture; a token is 2 by 2 of its pixels")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    held = states(arguments)
    loads = counts(arguments)
    speeds = times(loads, arguments)
    about = {
        "command": "python -m dit_accel.bench.offload",
        "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions("accelerate"),
        "loads": [asdict(row) for row in loads],
        "held": [asdict(row) for row in held],
        "speeds": [asdict(row) for row in speeds],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out / "offload.json", json.dumps(about, indent=2) + "\n")
    write_atomically(arguments.out / "offload.md", text(loads, held, speeds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
