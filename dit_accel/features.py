"""Features: a small classifier whose maps measure how different pictures look, and whose heads read captions back.

The shipped ones, `pipelines/fashion-classifier` and `pipelines/shapes-classifier`, know what those pipelines make.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from dit_accel.errors import CheckpointError, shown
from dit_accel.files import write_atomically
from dit_accel.quality import QualityError

SMALLEST_SIDE = 16  # pixels; four stages leave 2 x 2 places of it
FEWEST_FRAMES = 3  # the first frames in which a frame has one before and one after it
_FORMAT = "dit_accel.features/1"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
# What a config may ask for, so that a wrong or hostile one cannot fill the memory before its weights are looked at.
_MOST_STAGES, _MOST_CHANNELS, _MOST_HEADS, _MOST_WORDS = 5, 512, 32, 1000
_MOST_CONFIG_BYTES, _MOST_HEADER_BYTES = 1 << 18, 1 << 16
_JOINT = r"[-\s]+"  # between the parts of a word such as "t-shirt"
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}


@dataclass(frozen=True)
class ExtractorConfig:
    """What a `FeatureExtractor` is built from.

    channels: of each stage, 1 to 5 of them; each stage after the first halves height and width.
    frames: True for videos [B, F, C, H, W], whose stages also see the frames before and after.
    heads: what is told apart, each with its words in the order of its logits; none may be called "all".
    """

    channels: tuple[int, ...]
    frames: bool
    heads: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not _is_list(self.channels, _MOST_STAGES, int, lambda count: 1 <= count <= _MOST_CHANNELS):
            raise CheckpointError(
                f"channels is {shown(self.channels)}; give 1 to {_MOST_STAGES} whole numbers, 1 to {_MOST_CHANNELS}."
            )
        if type(self.frames) is not bool:
            raise CheckpointError(f"frames is {shown(self.frames)}; give true for videos or false for images.")
        if not isinstance(self.heads, Mapping) or not 1 <= len(self.heads) <= _MOST_HEADS:
            raise CheckpointError(f"heads is {shown(self.heads)}; give 1 to {_MOST_HEADS} names, each with its words.")
        for name, words in self.heads.items():
            if not isinstance(name, str) or not name or name == "all":
                raise CheckpointError(f"A head is called {shown(name)}; give it a name other than 'all'.")
            if not _is_list(words, _MOST_WORDS, str, _is_word) or len({*words}) != len(words):
                raise CheckpointError(
                    f"The words of the head {shown(name)} are {shown(words)}; give 1 to {_MOST_WORDS} different ones, "
                    "in lower case, such as 'dress' or 't-shirt'."
                )
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "heads", {name: tuple(words) for name, words in self.heads.items()})

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        heads = {name: list(words) for name, words in self.heads.items()}
        return {"format": _FORMAT, "channels": list(self.channels), "frames": self.frames, "heads": heads}

    @classmethod
    def from_dict(cls, data: Any) -> ExtractorConfig:
        """The config that `to_dict` gave; anything else is refused."""
        keys = {"format", "channels", "frames", "heads"}
        if not isinstance(data, dict) or data.get("format") != _FORMAT or set(data) != keys:
            raise CheckpointError(
                f"The config is {shown(data)}; give a mapping of {', '.join(sorted(keys))} with format {_FORMAT!r}."
            )
        return cls(data["channels"], data["frames"], data["heads"])


class FeatureExtractor(nn.Module):
    """A convolutional classifier with several heads, for images [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1].

    H and W from 16 and F from 3 on, odd ones too. It knows things of the size (in pixels) that it was trained on.
    """

    def __init__(self, config: ExtractorConfig):
        super().__init__()
        self.config = config
        widths = (3, *config.channels)
        self.stages = nn.ModuleList(
            _Stage(before, after, 2 if index else 1, config.frames)
            for index, (before, after) in enumerate(itertools.pairwise(widths))
        )
        self.head = nn.Linear(2 * widths[-1], sum(len(words) for words in config.heads.values()))
        self._patterns = {name: _pattern(words) for name, words in config.heads.items()}

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps of every stage: [B, C', H', W'] of images, [B, F, C', H', W'] of videos; none is negative."""
        self.check(x)
        frames = x.shape[1] if self.config.frames else 1
        hidden = x.to(self.head.weight) * 2 - 1
        if self.config.frames:
            hidden = hidden.flatten(0, 1)
        maps = []
        for stage in self.stages:
            hidden = stage(hidden, frames)
            maps.append(hidden.unflatten(0, (-1, frames)) if self.config.frames else hidden)
        return maps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits [B, words] of every head."""
        last = self.features(x)[-1]
        if self.config.frames:
            last = last.transpose(1, 2)
        places = last.flatten(2)  # [B, C', places]
        # The mean says how much there is of something, the maximum whether it is there at all, however small.
        logits = self.head(torch.cat([places.mean(2), places.amax(2)], dim=1))
        sizes = [len(words) for words in self.config.heads.values()]
        return dict(zip(self.config.heads, logits.split(sizes, dim=1)))

    @torch.no_grad()
    def predict(self, x: Tensor) -> dict[str, list[str]]:
        """The likeliest word of every head for each of B items; an item that is not finite gives a meaningless word."""
        logits = self(x)
        return {name: [words[i] for i in logits[name].argmax(1).tolist()] for name, words in self.config.heads.items()}

    def expected(self, caption: str) -> dict[str, str]:
        """The word of each head that a caption names; a head of which it names none, or two, is absent.

        Whole words count, in either case: "t-shirt" and "T shirt" are no "shirt". Nothing is understood beyond that: "a
        black dress on a white background" names two backgrounds, so none.
        """
        found = {}
        for name, pattern in self._patterns.items():
            words = {str(match.lastgroup) for match in pattern.finditer(caption.lower())}
            if len(words) == 1:
                found[name] = self.config.heads[name][int(words.pop().removeprefix("word"))]
        return found

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` (float32) into a folder, which is made where it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
        }
        write_atomically(folder / _WEIGHTS, save(tensors))
        write_atomically(folder / _CONFIG, json.dumps(self.config.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> FeatureExtractor:
        """The extractor that `save_pretrained` wrote, on the CPU and in evaluation mode. Nothing is ever downloaded."""
        folder = Path(folder)
        config = _read_config(folder / _CONFIG)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(_read_weights(folder / _WEIGHTS, model.state_dict()), assign=True)
        return model.eval().requires_grad_(False)

    def check(self, x: Tensor) -> None:
        """Refuse what is not a batch of pictures, or of videos, in a sentence."""
        wanted = "[B, F, 3, H, W]" if self.config.frames else "[B, 3, H, W]"
        if x.ndim != (5 if self.config.frames else 4) or x.shape[-3] != 3 or not x.numel():
            raise QualityError(f"The feature extractor got shape {list(x.shape)}; give {wanted}.")
        if not x.is_floating_point():
            raise QualityError(f"The feature extractor got {x.dtype}; give floating-point values in [0, 1].")
        if min(x.shape[-2:]) < SMALLEST_SIDE:
            raise QualityError(
                f"The feature extractor got {x.shape[-2]} x {x.shape[-1]} pixels; give at least {SMALLEST_SIDE} a side."
            )
        if self.config.frames and x.shape[1] < FEWEST_FRAMES:
            raise QualityError(f"The feature extractor got {x.shape[1]} frames; give at least {FEWEST_FRAMES}.")


class _Stage(nn.Module):
    """Halve (except the first), look at the neighbouring frames (of videos), refine; each time ReLU of a normed sum."""

    def __init__(self, before: int, after: int, stride: int, frames: bool):
        super().__init__()
        self.enter = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.enter_norm = nn.BatchNorm2d(after)
        self.across = _AcrossFrames(after) if frames else None
        self.refine = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.refine_norm = nn.BatchNorm2d(after)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x: [B * frames, C, H, W]"""
        x = functional.relu(self.enter_norm(self.enter(x)))
        if self.across is not None:
            x = self.across(x, frames)
        return functional.relu(x + self.refine_norm(self.refine(x)))


class _AcrossFrames(nn.Module):
    """Each place sees itself in the frame before, in its own and in the frame after; the ends see themselves twice."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = nn.Conv2d(3 * channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x: [B * frames, C, H, W]"""
        clip = x.unflatten(0, (-1, frames))
        before = torch.cat([clip[:, :1], clip[:, :-1]], dim=1)
        after = torch.cat([clip[:, 1:], clip[:, -1:]], dim=1)
        around = torch.cat([before, clip, after], dim=2).flatten(0, 1)
        return functional.relu(x + self.norm(self.mix(around)))


def _is_list(value: Any, most: int, kind: type, allowed: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= most:
        return False
    return all(type(item) is kind and allowed(item) for item in value)


def _is_word(text: str) -> bool:
    return re.fullmatch(r"[^\W_A-Z]+([- ][^\W_A-Z]+)*", text) is not None and text == text.lower()


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Finds whole words, the longest first; group `word3` is the word of index 3. A hyphen may be a space instead."""
    longest_first = sorted(range(len(words)), key=lambda index: -len(words[index]))
    groups = [f"(?P<word{i}>{_JOINT.join(re.split('[- ]', words[i]))})" for i in longest_first]
    return re.compile(rf"(?<![\w-])(?:{'|'.join(groups)})(?![\w-])")


def _read_config(path: Path) -> ExtractorConfig:
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}; give a folder that `save_pretrained` wrote.")
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; a config has at most {_MOST_CONFIG_BYTES}.")
    try:
        return ExtractorConfig.from_dict(json.loads(path.read_bytes()))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); write it anew with `save_pretrained`.") from error


def _read_weights(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of exactly the wanted names, shapes and types, all finite; the header is checked before they are read."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}; give a folder that `save_pretrained` wrote.")
    size, most = path.stat().st_size, sum(t.nbytes for t in wanted.values()) + _MOST_HEADER_BYTES
    if size > most:
        raise CheckpointError(f"{path} has {size} bytes; weights of this config have at most {most}.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
            given = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            needed = {name: (tuple(tensor.shape), _DTYPES[tensor.dtype]) for name, tensor in wanted.items()}
            wrong = sorted(name for name in {*given, *needed} if given.get(name) != needed.get(name))
            if wrong:
                name = wrong[0]
                raise CheckpointError(
                    f"{path} has {given.get(name, 'nothing')} for {shown(name)} where its config needs "
                    f"{needed.get(name, 'nothing')}; give the weights that belong to this config."
                )
            tensors = {name: file.get_tensor(name) for name in needed}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}).") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path} has values in {name!r} that are not finite; give weights that are.")
    return tensors
