"""Weights bench: a pipeline under every way to store its weights in 2 to 4 bits, against the dense run.

python -m dit_accel.bench.weights pipelines/tiny-flux --items 16 --steps 25 --out pipelines/tiny-flux/results

The linear layers in blocks get the weights that a method computes with, everything else stays as shipped. Hessians are
sums of x^T x over plain runs of other seeds; the error of outputs is measured on inputs of further seeds, which no
method has seen. Rows are written as they come: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import dit_accel
from dit_accel import Policy
from dit_accel.bench.captions import draw_captions
from dit_accel.bench.measure import Workload, load_workload
from dit_accel.bench.results import versions
from dit_accel.bench.weight_ours import OURS, WHOLE, Method, Quantised, denoiser_of, each_layer, quantisable
from dit_accel.bench.weight_results import Row, recorded, write
from dit_accel.bench.weight_rivals import RIVALS
from dit_accel.calls import Made
from dit_accel.errors import ArgumentError, nearest
from dit_accel.features import FeatureExtractor
from dit_accel.quality import caption_satisfied, psnr, relative_l2, summarize
from dit_accel.weights.hessian import output_error
from dit_accel.weights.vector_quant import VectorQuant

CALIBRATION, HELD_OUT = 1000, 2000  # first seeds of the runs that Hessians are collected in
PLAIN: dict[str, Method] = {
    "dense": each_layer(lambda weight, hessian: (weight, 4 * weight.numel())),
    "bfloat16": each_layer(lambda weight, hessian: (weight.bfloat16().float(), 2 * weight.numel())),
}


def methods() -> dict[str, Method | VectorQuant]:
    """Every method by name: as shipped, half precision, the rivals, the parts of ours, and ours as a whole."""
    return PLAIN | {name: each_layer(rival.function) for name, rival in RIVALS.items()} | OURS | WHOLE


def collect(workload: Workload, prompts: Sequence[str | None], first_seed: int) -> dict[str, Tensor]:
    """Layer -> H, the sum of x^T x over plain runs, float32 [I, I]; zero for a layer that was never called."""
    layers = quantisable(denoiser_of(workload.pipe))
    found = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}

    def adding(hessian: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            hessian.addmm_(x.T, x)

        return add

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(adding(found[name])).remove)
        for number, prompt in enumerate(prompts):
            workload.caller.make(prompt, first_seed + number, workload.steps)
    return found


class Bench:
    """A workload, and what every method is measured against. runs: for calibration, half as many held out."""

    def __init__(self, workload: Workload, extractor: FeatureExtractor, captions: Sequence[str | None], runs: int):
        self.workload, self.extractor = workload, extractor
        self.model = denoiser_of(workload.pipe)
        self.layers = quantisable(self.model)
        self.captions, self.runs = captions, runs

    @functools.cached_property
    def hessians(self) -> dict[str, Tensor]:
        return collect(self.workload, self.captions[: self.runs], CALIBRATION)

    @functools.cached_property
    def unseen(self) -> dict[str, Tensor]:
        """Hessians of other seeds, and other captions where there are enough."""
        return collect(self.workload, self.captions[self.runs :], HELD_OUT)

    @functools.cached_property
    def reference(self) -> list[Made]:
        return self.make()

    def make(self) -> list[Made]:
        """All items under the weights that are in place."""
        make = self.workload.caller.make
        return [make(prompt, item, self.workload.steps) for item, prompt in enumerate(self.workload.prompts)]

    @contextlib.contextmanager
    def installed(self, quantised: Quantised) -> Iterator[None]:
        """The weights of a method in place of those shipped, at the same places in memory."""
        shipped = {name: self.layers[name].weight.detach().clone() for name in quantised}
        try:
            with torch.no_grad():
                for name, (dense, _) in quantised.items():
                    self.layers[name].weight.copy_(dense)
            yield
        finally:
            with torch.no_grad():
                for name, weight in shipped.items():
                    self.layers[name].weight.copy_(weight)

    def measure(self, name: str, method: Method | VectorQuant) -> Row:
        """All items under one method. Layers that it leaves out count as shipped."""
        if isinstance(method, VectorQuant):
            return self.measure_whole(name, method)
        hessians, _ = self.hessians, self.reference  # collected before the time is taken
        started = time.perf_counter()
        quantised = method(self.workload.pipe, hessians)
        seconds = time.perf_counter() - started
        weights = {name: layer.weight.detach() for name, layer in self.layers.items()}
        dense = {name: quantised[name][0] if name in quantised else weight for name, weight in weights.items()}
        shipped = {name: weight.numel() * weight.element_size() for name, weight in weights.items()}
        stored = sum(quantised[name][1] if name in quantised else count for name, count in shipped.items())
        whole = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        counted = {
            "bits_per_weight": 8 * stored / sum(weight.numel() for weight in weights.values()),
            "layer_bytes": stored,
            "file_bytes": whole - sum(shipped.values()) + stored,
        }
        with self.installed(quantised):
            made = self.make()
        return self._row(name, weights, dense, made, seconds, counted)

    def measure_whole(self, name: str, settings: VectorQuant) -> Row:
        """All items under settings as a user gives them, calibrated on the same captions; bytes as saved."""
        _, weights = self.reference, {name: layer.weight.detach() for name, layer in self.layers.items()}
        prompts = tuple(caption for caption in self.captions[: self.runs] if caption is not None)
        calibrate = dataclasses.replace(settings.calibrate, prompts=prompts, runs=self.runs, steps=self.workload.steps)
        started = time.perf_counter()
        policy = Policy(weights=dataclasses.replace(settings, calibrate=calibrate))
        with dit_accel.apply(self.workload.pipe, policy, arguments=self.workload.caller.arguments) as session:
            seconds = time.perf_counter() - started
            formats = next(iter(session.quantized.values())).formats
            made = self.make()
            coded: dict[str, Any] = {name: self.model.get_submodule(name) for name in formats}
            dense = weights | {name: coded[name].decode() for name in formats if name in weights}
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        linear = [format for format in formats.values() if format.kind == "linear"]  # as for the rivals
        stored = sum(format.nbytes() for format in linear)
        count = sum(format.shape[0] * format.shape[1] for format in linear)
        counted = {"bits_per_weight": 8 * stored / count, "layer_bytes": stored, "file_bytes": size}
        return self._row(name, weights, dense, made, seconds, counted)

    def _row(
        self,
        name: str,
        weights: Mapping[str, Tensor],
        dense: Mapping[str, Tensor],
        made: Sequence[Made],
        seconds: float,
        counted: Mapping[str, Any],
    ) -> Row:
        """The row of a method. weights, dense: by layer, as shipped and as the method computes with them [O, I]."""
        reference = self.reference
        seen = [name for name in weights if float(self.unseen[name].trace()) > 0]
        weight_error = statistics.fmean(output_error(weights[name], dense[name]) for name in weights)
        outputs = statistics.fmean(output_error(weights[name], dense[name], self.unseen[name]) for name in seen)
        levels = summarize([summarize(psnr(a.frames, b.frames)).mean for a, b in zip(made, reference)])
        pictures = [100 * float(relative_l2(a.pictures, b.pictures)) for a, b in zip(made, reference)]
        latents = [
            100 * float(relative_l2(a.latents, b.latents))
            for a, b in zip(made, reference)
            if a.latents is not None and b.latents is not None
        ] or [float("nan")]
        asked = [str(prompt) for prompt in self.workload.prompts]
        satisfied = caption_satisfied(torch.cat([one.pictures for one in made]), asked, self.extractor)["all"]
        return Row(
            method=name,
            **counted,
            weight_error=100 * weight_error,
            output_error=100 * outputs,
            psnr_mean=levels.mean,
            psnr_worst=levels.worst,
            worst_item=levels.worst_index,
            picture_l2_mean=statistics.fmean(pictures),
            picture_l2_worst=max(pictures),
            latent_l2_mean=statistics.fmean(latents),
            latent_l2_worst=max(latents),
            captions=satisfied.share,
            seconds=seconds,
        )


def load_bench(
    folder: Path, items: int, steps: int, guidance: float | None, runs: int, classifier: Path | None = None
) -> Bench:
    """The bench of a pipeline folder; classifier: by default the one beside it that judges pictures, or videos."""
    workload = load_workload(folder, steps, guidance, items)
    is_video = workload.caller.make(workload.prompts[0], 0, 1).is_video
    beside = folder.parent / ("shapes-classifier" if is_video else "fashion-classifier")
    extractor = FeatureExtractor.from_pretrained(classifier or beside)
    drawn = draw_captions((folder / "captions.txt").read_text().splitlines(), runs + max(1, runs // 2))
    return Bench(workload, extractor, drawn, runs)


def _limited(method: Method | VectorQuant, calls: int | None, tuning: int | None) -> Method | VectorQuant:
    """Settings of ours with less work in them, for pipelines whose calls are long."""
    if not isinstance(method, VectorQuant):
        return method
    found = method.calibrate
    found = dataclasses.replace(found, calls=min(found.calls, calls or found.calls))
    if tuning is not None and found.tuning:
        found = dataclasses.replace(found, tuning=tuning)
    return dataclasses.replace(method, calibrate=found)


def _calibration(name: str, method: Method | VectorQuant) -> dict[str, Any]:
    """What a method of ours looked at, and how long it learned."""
    if not isinstance(method, VectorQuant) or not method.is_calibrated:
        return {}
    return {name: {"calls": method.calibrate.calls, "tuning": method.calibrate.tuning}}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="folder of a trained pipeline with prompts.txt and captions.txt")
    parser.add_argument("--items", type=int, default=16, help="prompts used, item i with seed i")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, help="default: the one in dit_accel_defaults.json")
    parser.add_argument("--runs", type=int, default=4, help="plain runs that Hessians are collected in")
    parser.add_argument("--calls", type=int, help="model calls that our calibrated methods keep (default: their own)")
    parser.add_argument("--tuning", type=int, help="steps of our tuning of the whole, where there is one")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"default: all of {', '.join(methods())}")
    parser.add_argument("--classifier", type=Path, help="default: the fitting one beside the pipeline")
    parser.add_argument("--fresh", action="store_true", help="measure the methods again, whatever is recorded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    known = {name: _limited(method, arguments.calls, arguments.tuning) for name, method in methods().items()}
    chosen = arguments.methods or list(known)
    for name in chosen:
        if name not in known:
            raise ArgumentError(f"There is no method {name!r}; {nearest(name, known)}.")
    torch.set_num_threads(arguments.threads)
    bench = load_bench(
        arguments.pipeline, arguments.items, arguments.steps, arguments.guidance, arguments.runs, arguments.classifier
    )
    guidance = bench.workload.guidance
    path = arguments.out / f"weights-guidance-{guidance:g}"
    settings = {
        "items": len(bench.workload.prompts),
        "steps": arguments.steps,
        "guidance": guidance,
        "runs": arguments.runs,
    }
    try:
        kept, left_out, calibration = recorded(path, settings)
    except ArgumentError:
        if not arguments.fresh:
            raise
        kept, left_out, calibration = [], {}, {}
    if arguments.fresh:
        kept = [row for row in kept if row.method not in chosen]
    rows = {row.method: row for row in kept}
    about: dict[str, Any] = {
        "command": f"python -m dit_accel.bench.weights {arguments.pipeline} --items {arguments.items} --steps "
        f"{arguments.steps} --guidance {guidance:g} --runs {arguments.runs}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions("torchao", "sdnq", "gguf"),
        "settings": settings,
        "layers": len(bench.layers),
        "left_out": left_out,
        "calibration": calibration,
    }
    bar = tqdm([name for name in chosen if name not in rows], disable=None)
    for name in bar:
        bar.set_description(name)
        left_out.pop(name, None)
        try:
            row = bench.measure(name, known[name])
        except Exception as error:  # a rival may raise anything where it does not know a shape, or is not installed
            left_out[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            bar.write(f"{name:24s} left out: {left_out[name]}")
        else:
            rows[name] = row
            calibration |= _calibration(name, known[name])
            quality = f"{row.psnr_mean:5.1f} dB, worst {row.psnr_worst:5.1f}, captions {row.captions:.2f}"
            bar.write(f"{name:24s} {row.bits_per_weight:6.3f} bits  output error {row.output_error:7.3f} %  {quality}")
        write([rows[name] for name in known if name in rows], path, about, chart=False)
    write([rows[name] for name in known if name in rows], path, about, chart=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
