"""Export: what makes the same picture again without the studio: a policy file, three lines of Python, a command, a
link."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from dit_accel.calls import class_of
from dit_accel.policy import VERSION, Policy
from dit_accel.studio.catalogue import Model
from dit_accel.studio.wanted import Wanted

POLICY_FILE, JOB_FILE, STEM = "policy.json", "job.jsonl", "picture"
LINKED = ("pipeline", "prompt", "seed", "steps", "guidance", "height", "width", "frames", "policy")


def policy_json(policy: Policy) -> str:
    """What `Policy.save` writes."""
    return json.dumps({"version": VERSION} | policy.to_dict(), indent=2) + "\n"


def python_lines(wanted: Wanted, model: Model) -> str:
    """Imports, and three lines."""
    policy = wanted.policy_name or POLICY_FILE
    call = {"num_inference_steps": wanted.steps} | dict(wanted.arguments)
    given = "".join(f", {name}={value!r}" for name, value in call.items())
    prompt = f"class_labels=[{class_of(model.pipe, wanted.prompt)}]" if model.takes_class else repr(wanted.prompt)
    results = "images" if model.frames is None else "frames"
    return (
        "import dit_accel, torch\n"
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({_path(model.folder)!r})\n"
        f"session = dit_accel.apply(pipe, {policy!r})\n"
        f"picture = pipe({prompt}, generator=torch.Generator().manual_seed({wanted.seed}){given}).{results}[0]\n"
    )


def job(wanted: Wanted, model: Model) -> dict[str, Any]:
    """The request as an item of a manifest; what the pipeline's folder says by itself is left out."""
    own = {name: value for name, value in wanted.row.items() if model.defaults.get(name) != value}
    return own | {"output": STEM}


def command(wanted: Wanted, model: Model) -> str:
    """Shell commands that render the picture, and measure it."""
    policy, folder = wanted.policy_name or POLICY_FILE, shlex.quote(_path(model.folder))
    line = shlex.quote(json.dumps(job(wanted, model), ensure_ascii=False))
    others = {name: value for name, value in wanted.arguments.items() if model.defaults.get(name) != value}
    given = "".join(f" --arg {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in others.items())
    return (
        f"printf '%s\\n' {line} > {JOB_FILE}\n"
        f"dit-accel render {JOB_FILE} --pipeline {folder} --policy {policy} --out rendered\n\n"
        f"dit-accel compare {folder} --policy {policy} --prompts {shlex.quote(wanted.prompt)} "
        f"--seeds {wanted.seed} --steps {wanted.steps}{given}\n"
    )


def query(wanted: Wanted, model: Model) -> str:
    """The part of a link behind the question mark; `linked` reads it back."""
    arguments = wanted.arguments
    values = {
        "pipeline": wanted.pipeline,
        "prompt": wanted.prompt,
        "seed": wanted.seed,
        "steps": wanted.steps,
        "guidance": arguments.get(model.guidance or ""),
        "height": arguments.get("height"),
        "width": arguments.get("width"),
        "frames": arguments.get("num_frames"),
        "policy": wanted.policy_name or json.dumps(essentials(wanted.policy), separators=(",", ":")),
    }
    return urlencode({name: value for name, value in values.items() if value is not None})


def linked(parameters: Mapping[str, str]) -> dict[str, Any]:
    """What a link asks for; numbers where they are such. Nothing is checked yet."""
    found: dict[str, Any] = {name: parameters[name] for name in LINKED if name in parameters}
    for name in set(found) - {"pipeline", "prompt", "policy"}:
        try:
            found[name] = float(found[name])
        except ValueError:
            continue  # stays text, which the check refuses with a sentence
    return found


def essentials(settings: Any) -> dict[str, Any]:
    """Of a policy, or a part of it, what differs from the defaults, as plain data."""
    found: dict[str, Any] = {}
    whole = settings.to_dict()
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.default is MISSING or value != field.default:
            found[field.name] = essentials(value) if is_dataclass(value) else whole[field.name]
    return found


def _path(folder: Path) -> str:
    """A folder as one would write it here: from the working directory where it is below that."""
    return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else os.fspath(folder)
