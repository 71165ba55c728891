"""Load memory: the most memory that a transformer takes while it is loaded: dense, quantised on the way, and reloaded.

    python -m dit_accel.bench.load_memory --out docs/results/load-memory.json

A Flux transformer of full width and few blocks, with random weights, is saved in shards. Each way of loading runs in a
fresh process. Two numbers each, both above what the process had after its imports: RSS, all resident pages, those of
mapped files among them, and RssAnon, the pages that only this process has. The promise is about RSS: at most 1.2 times
the quantised model, and one dense layer. A dense model is mapped, so its row is small until it is first used.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.bench.results import versions
from dit_accel.files import write_atomically

MIB = 2**20
SHARE = 1.2  # of the quantised size, beside one dense layer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double", type=int, default=2, help="blocks of the first list")
    parser.add_argument("--single", type=int, default=4, help="blocks of the second list")
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels each; 24 is the width of FLUX.1")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the dense files")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--shard", default="1GB", help="largest shard of the dense files")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.step:
        print(json.dumps(STEPS[arguments.step[0]](arguments, Path(arguments.step[1]))))
        return 0
    report = measure(arguments)
    print(json.dumps(report, indent=2))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.out, json.dumps(report, indent=2) + "\n")
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every step in a process of its own -> what was measured, sizes in MiB."""
    given = {key: getattr(arguments, key) for key in ("double", "single", "heads", "dtype", "bits")}
    options = [word for key, value in (given | {"shard": arguments.shard}).items() for word in (f"--{key}", str(value))]
    report: dict[str, Any] = {"versions": versions(), **given}
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            command = [sys.executable, "-m", "dit_accel.bench.load_memory", *options, "--step", step, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            report[step] = json.loads(done.stdout.splitlines()[-1])
    largest = report["save"]["largest_layer"]
    for step in ("quantise", "reload"):
        row = report[step]
        row["allowed"] = round(SHARE * row["size"] + largest, 1)
        row["kept"] = row["rss"] <= row["allowed"]
    return report


def _save(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    import torch
    from diffusers import FluxTransformer2DModel

    torch.set_default_dtype(getattr(torch, arguments.dtype))
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=arguments.double, num_single_layers=arguments.single, num_attention_heads=arguments.heads
    )
    model.save_pretrained(folder / "dense", max_shard_size=arguments.shard)
    layers = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return {"size": _size(model), "largest_layer": max(w.numel() * w.element_size() for w in layers) / MIB}


def _dense(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    return _loaded(arguments, folder / "dense")[1]


def _quantise(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    from dit_accel import VQConfig

    model, found = _loaded(arguments, folder / "dense", quantization_config=VQConfig(bits=arguments.bits))
    model.save_pretrained(folder / "quantised")
    return found


def _reload(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    return _loaded(arguments, folder / "quantised")[1]


STEPS = {"save": _save, "dense": _dense, "quantise": _quantise, "reload": _reload}


def _loaded(arguments: argparse.Namespace, folder: Path, **options: Any) -> tuple[Any, dict[str, float]]:
    """The model, and its size, the peaks above the imports in MiB, and seconds."""
    import torch
    from diffusers import FluxTransformer2DModel

    import dit_accel

    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # what the first product sets up is no import
    assert dit_accel.load_model and FluxTransformer2DModel
    started = time.perf_counter()
    with Peaks() as peaks:
        model = dit_accel.load_model(folder, torch_dtype=getattr(torch, arguments.dtype), **options)
    seconds = round(time.perf_counter() - started, 1)
    return model, {"size": _size(model), "rss": peaks.rss, "rss_anon": peaks.anon, "seconds": seconds}


def _size(model: Any) -> float:
    """MiB of all parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return round(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB, 1)


class Peaks:
    """The highest resident memory inside the block, above that at its start, in MiB; seen every 2 ms. Linux only."""

    rss = anon = 0.0

    def __enter__(self) -> Peaks:
        self._start = _resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            rss, anon = _resident()
            self.rss = max(self.rss, round(rss - self._start[0], 1))
            self.anon = max(self.anon, round(anon - self._start[1], 1))
            if self._over.wait(0.002):
                return

    def __exit__(self, *reason: object) -> None:
        self._over.set()
        self._thread.join()


def _resident() -> tuple[float, float]:
    """RSS and RssAnon of this process in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024, int(lines["RssAnon"].split()[0]) / 1024


if __name__ == "__main__":
    raise SystemExit(main())
