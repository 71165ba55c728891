"""Signature: what arguments a pipeline takes, read from diffusers' source, so that a wrong name is known at once."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dit_accel.errors import ManifestError


@dataclass(frozen=True)
class Signature:
    """class_name: of the pipeline; names: of its call's arguments, `None` where only a loaded pipeline tells them."""

    class_name: str
    names: frozenset[str] | None

    @property
    def makes_video(self) -> bool:
        return self.names is not None and "num_frames" in self.names


def signature_of(pipeline: str | os.PathLike[str]) -> Signature:
    """Of a pipeline's folder, without loading it; a hub id is not looked up. Raises ManifestError."""
    path = Path(pipeline) / "model_index.json"
    name = os.fspath(pipeline)
    if not path.parent.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ManifestError(f"There is no folder {name}, and it is no hub id (owner/name); give one of them.")
        return Signature("the pipeline", None)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        name = next(value for key, value in index.items() if key.endswith("class_name"))
    except (OSError, ValueError, AttributeError, StopIteration):
        if (path.parent / "modular_model_index.json").is_file():
            return Signature("the pipeline", None)
        raise ManifestError(
            f"{path.parent} is no pipeline: it has no model_index.json that names a class; give a folder that has one."
        ) from None
    if not isinstance(name, str) or not name.isidentifier():
        return Signature("the pipeline", None)
    names = _arguments_of(name)
    if names is not None and "prompt" not in names and "class_labels" in names:
        names |= {"prompt"}  # a class by its name
    return Signature(name, names)


@functools.cache
def _arguments_of(class_name: str) -> frozenset[str] | None:
    """Names that `__call__` of a pipeline of diffusers takes; `None` where its source does not say."""
    found = importlib.util.find_spec("diffusers")
    places = (found.submodule_search_locations or []) if found is not None else []
    definition = re.compile(rf"^class {class_name}\(".encode(), re.MULTILINE)
    for place in places:
        for path in sorted((Path(place) / "pipelines").rglob("pipeline_*.py")):
            source = path.read_bytes()
            if definition.search(source):
                return _call_of(ast.parse(source), class_name)
    return None


def _call_of(tree: ast.Module, class_name: str) -> frozenset[str] | None:
    for kind in tree.body:
        if isinstance(kind, ast.ClassDef) and kind.name == class_name:
            for method in kind.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__call__" and method.args.kwarg is None:
                    return frozenset(a.arg for a in (*method.args.args, *method.args.kwonlyargs) if a.arg != "self")
    return None
