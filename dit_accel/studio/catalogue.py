"""Catalogue: the pipelines that visitors may choose from, fixed by the operator; loaded when first asked for."""

from __future__ import annotations

import inspect
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dit_accel
from dit_accel.calls import Caller
from dit_accel.cli import call_defaults, load_pipeline
from dit_accel.denoiser.find import find_denoisers
from dit_accel.errors import ArgumentError
from dit_accel.features import FeatureExtractor
from dit_accel.stage_plan import asked_size, side_multiple

_INDEX, _PROMPTS = "model_index.json", "prompts.txt"
_SIZES = ("height", "width")
_WARM_UP_STEPS = 2  # of an uncounted call: the first one of a process is slower
MOST_LOADED = 4  # pipelines in memory at once; the one that was not used for longest goes first


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, and what its calls take.

    guidance: name of the argument, `None` where there is none; takes_class: a prompt is the name of a class; defaults:
    call arguments of the folder; size: height and width in pixels that it makes by itself, `None` where they cannot be
    chosen; multiple: of a side; frames: asked for by default, `None` for images; prompts: examples; classifier: reads
    captions back, where there is one.
    """

    name: str
    folder: Path
    pipe: Any = field(repr=False)
    guidance: str | None
    takes_class: bool
    defaults: Mapping[str, Any]
    size: tuple[int, int] | None
    multiple: int
    frames: int | None
    prompts: tuple[str, ...] = field(repr=False)
    classifier: FeatureExtractor | None = field(repr=False)

    @property
    def default_guidance(self) -> float:
        return float(self.defaults.get(self.guidance or "", 1.0))


class Catalogue:
    """folders: of diffusers pipelines, or of folders of them. Raises ArgumentError where there is none."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = _found(folders)
        self._loaded: OrderedDict[str, Model] = OrderedDict()

    @property
    def names(self) -> list[str]:
        return list(self.folders)

    def loaded(self, name: str) -> Model | None:
        """The pipeline of that name if it is in memory."""
        return self._loaded.get(name)

    def load(self, name: str) -> Model:
        """The pipeline of a known name. Raises UsageError where its folder cannot be loaded."""
        if name not in self._loaded:
            self._loaded[name] = _load(name, self.folders[name])
            while len(self._loaded) > MOST_LOADED:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(name)
        return self._loaded[name]


def shipped_folders() -> list[Path]:
    """`pipelines/` of a checkout of this repository: beside the package, or in the working directory."""
    places = (Path(dit_accel.__file__).parents[1] / "pipelines", Path.cwd() / "pipelines")
    return [place for place in places if any(place.glob(f"*/{_INDEX}"))][:1]


def _found(folders: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        inside = [folder] if (folder / _INDEX).is_file() else sorted(path.parent for path in folder.glob(f"*/{_INDEX}"))
        if not inside:
            raise ArgumentError(f"{folder} is no pipeline, nor a folder of some: there is no {_INDEX}; give another.")
        for path in (path.resolve() for path in inside):
            name = path.name if found.get(path.name, path) == path else f"{path.parent.name}/{path.name}"
            found[name] = path
    if not found:
        raise ArgumentError("No pipeline is given, and none is shipped here; give folders with --pipelines.")
    # A text-to-image pipeline that answers fast is the best first impression.
    return dict(sorted(found.items(), key=lambda pair: pair[0] != "tiny-flux"))


def _load(name: str, folder: Path) -> Model:
    pipe, defaults = load_pipeline(folder), call_defaults(folder)
    caller = Caller(pipe, defaults)
    takes_size = set(_SIZES) <= caller.parameters.keys()
    size = None
    if takes_size:
        size = asked_size(pipe, inspect.signature(type(pipe).__call__).bind_partial(pipe, **defaults))
    frames = defaults.get("num_frames")
    if frames is None and "num_frames" in caller.parameters:
        frames = caller.parameters["num_frames"].default
    multiple = side_multiple(pipe, list(find_denoisers(pipe).values()))
    classifier = _classifier(folder.parent, moving=frames is not None)
    prompts = _prompts(folder, pipe)
    if prompts:
        warm = {key: value for key, value in defaults.items() if key != "class_labels"}  # the prompt says which
        Caller(pipe, warm).make(prompts[0], 0, _WARM_UP_STEPS)
    return Model(
        name,
        folder,
        pipe,
        caller.guidance,
        "class_labels" in caller.parameters and "prompt" not in caller.parameters,
        defaults,
        size,
        multiple,
        frames,
        prompts,
        classifier,
    )


def _prompts(folder: Path, pipe: Any) -> tuple[str, ...]:
    """Examples: those of the folder, or names of classes."""
    path = folder / _PROMPTS
    if path.is_file():
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return tuple(list(getattr(pipe, "labels", None) or ())[:32])


def _classifier(folder: Path, moving: bool) -> FeatureExtractor | None:
    """The classifier beside the pipelines that looks at such pictures, `moving` ones or still ones."""
    for path in sorted(folder.glob("*-classifier/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("frames") is moving:
            return FeatureExtractor.from_pretrained(path.parent)
    return None
