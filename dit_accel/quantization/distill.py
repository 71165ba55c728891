"""Distil: the quantised model as a whole learns to give the dense model's outputs on the calibration calls.

What is continuous learns by Adam: codebooks, row scales, low-rank parts, and what stays dense (biases, norms,
embedders). Codes follow by the straight-through estimator: each vector has a shadow that takes the gradient of its
codeword, and every few steps its code becomes the one nearest to the shadow. After the last change of codes the rest
goes on learning, with the rate falling along a cosine, and all is rounded to what a file holds.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dit_accel.denoiser.whole import tensors_in
from dit_accel.quantization.calibrate import Progress
from dit_accel.quantization.collect import Call, can_be_joined, joined
from dit_accel.quantization.install import packed
from dit_accel.quantization.keep import Kept
from dit_accel.quantization.refine import Opened
from dit_accel.weights.codebook import assign
from dit_accel.weights.encode import Encoded, look_up, storable
from dit_accel.weights.format import LayerFormat
from dit_accel.weights.storage import Stored
from dit_accel.weights.vector_quant import VectorQuant

BATCH = 4  # calls of one step
RECODE_EVERY = 10  # steps between changes of codes
RECODE_UNTIL = 0.6  # of all steps
SHADOW_RATE = 2.0  # of the shadows, in rates of everything else
WARM = 20  # steps in which the rate rises
KEEP_EVERY = 100  # steps
_JUDGED = 32  # calls that say whether it helped


class Student:
    """Everything that learns. codes: by layer, int64 [O, S, n]."""

    def __init__(
        self, model: nn.Module, opened: Mapping[str, Opened], books: Mapping[str, Tensor], settings: VectorQuant
    ):
        self.model, self.opened = model, opened
        self.codes = {name: one.made.codes for name, one in opened.items()}
        self.learning: dict[str, Tensor] = {f"book {size}": book.clone() for size, book in books.items()}
        for name, one in opened.items():
            made = one.made
            self.learning[f"scale {name}"] = made.row_scale.clone()
            if one.format.source == "own":
                self.learning[f"book {name}"] = made.codebook.clone()
            if made.low_rank is not None:
                self.learning[f"first {name}"], self.learning[f"second {name}"] = (x.clone() for x in made.low_rank)
        coded = {f"{name}.weight" for name in opened}
        self.dense = {
            name: value for name, value in model.named_parameters() if name not in coded and value.is_floating_point()
        }
        self.learning |= {f"dense {name}": value.detach().float().clone() for name, value in self.dense.items()}
        self.shadows = {name: look_up(one.made.codes, one.made.codebook) for name, one in opened.items()}
        rate = settings.calibrate.rate
        groups = [self._group(value, rate) for value in self.learning.values()]
        groups += [self._group(value, rate * SHADOW_RATE, 1.0) for value in self.shadows.values()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))

    @staticmethod
    def _group(value: Tensor, rate: float, size: float | None = None) -> dict[str, Any]:
        size = max(float(value.square().mean().sqrt()), 1e-3) if size is None else size
        return {"params": [value.requires_grad_()], "lr": rate * size, "base": rate * size}

    def book(self, name: str) -> Tensor:
        """The codebook of a layer as it is by now -> [S, K, d]."""
        format = self.opened[name].format
        return self.learning[f"book {format.codebook if format.source == 'shared' else name}"]

    def weight(self, name: str, *, straight_through: bool) -> Tensor:
        """The weight of a layer as it is by now, in the layer's own inputs -> [O, I]."""
        one = self.opened[name]
        unit = look_up(self.codes[name], self.book(name))
        if straight_through:
            unit = unit + (self.shadows[name] - self.shadows[name].detach())
        weight = unit * self.learning[f"scale {name}"].unsqueeze(1)
        if one.made.low_rank is not None:
            weight = weight + self.learning[f"second {name}"] @ self.learning[f"first {name}"]
        return one.back(weight)

    def outputs(self, call: Call, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """What the model gives with what was learned so far."""
        given = dict(weights) | {name: self.learning[f"dense {name}"].to(v.dtype) for name, v in self.dense.items()}
        return tensors_in(functional_call(self.model, given, call.args, call.kwargs))

    def step(self, batch: Sequence[Call], energy: float, rate: float, *, recoding: bool) -> float:
        """One step on a batch -> its loss. rate: factor of the learning rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate
        self.optimizer.zero_grad()
        dtype = next(iter(self.dense.values())).dtype
        weights = {f"{name}.weight": self.weight(name, straight_through=recoding).to(dtype) for name in self.opened}
        loss = torch.zeros(())
        for call in batch:
            for output, wanted in zip(self.outputs(call, weights), call.output):
                loss = loss.to(output.device) + (output.float() - wanted.float()).square().mean()
        loss = loss / (len(batch) * energy)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def error(self, calls: Sequence[Call], energy: float) -> float:
        """Mean square error of the outputs over their energy, as the weights would be stored now."""
        dtype = next(iter(self.dense.values())).dtype
        weights = {f"{name}.weight": self.weight(name, straight_through=False).to(dtype) for name in self.opened}
        pairs = [pair for call in calls for pair in zip(self.outputs(call, weights), call.output)]
        return sum(float((a.float() - b.float()).square().mean()) for a, b in pairs) / (len(calls) * energy)

    @torch.no_grad()
    def recode(self) -> None:
        """Every vector to the codeword that is nearest to its shadow."""
        for name, one in self.opened.items():
            vectors = self.shadows[name].reshape(-1, one.format.width)
            found = assign(vectors, self.book(name)).view(*self.codes[name].shape[::2], -1)
            self.codes[name] = found.transpose(1, 2).contiguous()

    def state(self) -> dict[str, Tensor]:
        """All that a later step depends on."""
        found = {f"learning {key}": value for key, value in self.learning.items()}
        found |= {f"shadow {key}": value for key, value in self.shadows.items()}
        found |= {f"codes {key}": value for key, value in self.codes.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            found |= {f"adam {number} {key}": value for key, value in state.items()}
        return found

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that was kept."""
        for key, value in self.learning.items():
            value.copy_(state[f"learning {key}"])
        for key, value in self.shadows.items():
            value.copy_(state[f"shadow {key}"])
        self.codes = {key: state[f"codes {key}"].to(value.device) for key, value in self.codes.items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, _, rest = key.partition(" ")
            if kind == "adam":
                number, _, name = rest.partition(" ")
                moments.setdefault(int(number), {})[name] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": moments, "param_groups": whole["param_groups"]})


def distill(
    model: nn.Module,
    formats: Mapping[str, LayerFormat],
    found: Mapping[str, Stored],
    books: Mapping[str, Tensor],
    calls: Sequence[Call],
    settings: VectorQuant,
    kept: Kept,
    progress: Progress,
    undo: contextlib.ExitStack,
) -> tuple[dict[str, Stored], dict[str, Tensor]]:
    """Codes of every layer and the shared codebooks, learned. The dense rest of the model is changed in place; undo
    gets its way back.

    A layer whose format has a codebook of its own keeps one; shared codebooks learn from all layers at once. Where the
    outputs are no nearer afterwards, all stays as it was found, and a warning says so.
    """
    student = Student(model, {name: Opened.of(found[name], formats[name]) for name in formats}, books, settings)
    energy = sum(float(t.float().square().mean()) for call in calls for t in call.output) / len(calls)
    judged = list(calls[:: max(1, len(calls) // _JUDGED)])
    before = student.error(judged, energy)
    steps, first = settings.calibrate.tuning, 0
    state = kept.read("tuning")
    if state is not None:
        first = int(state.pop("step"))
        student.restore(state)
    together = len(calls) >= BATCH and can_be_joined(model, calls[:BATCH])
    for step in range(first, steps):
        progress("tuning of the whole model", step, steps)
        rate = min(1.0, (step + 1) / WARM) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        batch = random.Random(f"{settings.seed} {step}").sample(list(calls), min(BATCH, len(calls)))
        batch = [joined(batch)] if together else batch
        recoding = step < RECODE_UNTIL * steps
        student.step(batch, energy, rate, recoding=recoding)
        if recoding and (step + 1) % RECODE_EVERY == 0:
            student.recode()
        if (step + 1) % KEEP_EVERY == 0:
            kept.write("tuning", student.state() | {"step": torch.tensor(step + 1)})
    progress("tuning of the whole model", steps, steps)
    after = student.error(judged, energy)
    if not after < before:
        warnings.warn(
            f"The tuning was given up: it made the error of the outputs {after:.3g}, from {before:.3g}; lower its "
            "rate, or give it more steps.",
            stacklevel=2,
        )
        return dict(found), dict(books)
    _give_back(student, undo)
    return _packed(student, found), {size: storable(student.learning[f"book {size}"].detach()) for size in books}


def _give_back(student: Student, undo: contextlib.ExitStack) -> None:
    """What stays dense, as learned, into the model."""
    for name, parameter in student.dense.items():
        before = parameter.data
        parameter.data = student.learning[f"dense {name}"].detach().to(parameter.dtype)
        undo.callback(setattr, parameter, "data", before)


@torch.no_grad()
def _packed(student: Student, found: Mapping[str, Stored]) -> dict[str, Stored]:
    """What was learned, as it is stored."""
    made = {}
    for name, one in student.opened.items():
        rank = None
        if one.made.low_rank is not None:
            rank = (storable(student.learning[f"first {name}"]), storable(student.learning[f"second {name}"]))
        encoded = Encoded(
            student.codes[name], storable(student.learning[f"scale {name}"]), storable(student.book(name)), rank
        )
        made[name] = packed(encoded, one.format, found[name].signs)
    return made
