"""Fields: what an item of a manifest may hold, checked without a framework, and published as a JSON Schema."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from dit_accel.errors import ManifestError, nearest, shown
from dit_accel.policy import Policy
from dit_accel.render.names import checked_output

LARGEST_SEED = 2**63 - 1
LONGEST_TEXT = 20_000  # characters
DEEPEST = 8  # nested lists and mappings in an argument
ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")

TEXTS = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
INTEGERS = {"height": 65536, "width": 65536, "num_frames": 65536, "num_inference_steps": 10_000}  # 1 to these
NUMBERS = ("guidance_scale", "guidance_scale_2", "true_cfg_scale")
OWN = {  # keys that are not arguments of the pipeline -> what they are
    "id": "name of the item, unique in the manifest; without one, a hash of the item",
    "seed": "of the item's generator; without one, a hash of the base seed and the id",
    "policy": "instead of the render's: a preset or method name, a .json or .yaml file, or a policy itself",
    "output": "name of the item's file, below the output folder, such as cats/one.png; without one, made of the id",
}
_REFUSED = {  # arguments of pipelines that no manifest may set -> why
    "generator": "give a seed instead",
    "output_type": "it is set by the render",
    "return_dict": "it is set by the render",
    "timesteps": "give num_inference_steps instead",
    "sigmas": "give num_inference_steps instead",
    "num_images_per_prompt": "one item is one file, so give several items",
    "num_videos_per_prompt": "one item is one file, so give several items",
    "callback_on_step_end": "it is set by the render",
    "callback_on_step_end_tensor_inputs": "it is set by the render",
}
_TENSORS = re.compile(r".*(embeds|embeds_mask|latents|image|images|video|mask)$")


def checked(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row with each value in its own type. where: of the row, for messages, such as "jobs.jsonl, line 3".

    Raises ManifestError.
    """
    return {key: _checked(key, value, where) for key, value in row.items() if value is not None}


def _checked(key: Any, value: Any, where: str) -> Any:
    if not isinstance(key, str) or not key.isidentifier():
        raise ManifestError(
            f"{where}: {shown(key)} is no name of a field; give names such as {', '.join(sorted(OWN))} or prompt."
        )
    reason = _REFUSED.get(key) or ("tensors and pictures cannot be given in a manifest" if _TENSORS.match(key) else "")
    if reason:
        raise ManifestError(f"{where}: {key} cannot be set; {reason}.")
    if key == "id":
        if not isinstance(value, str) or not ID.fullmatch(value):
            raise _wrong(where, key, value, "1 to 100 letters, digits, '.', '_' or '-', the first not '.' or '-'")
        return value
    if key == "seed":
        if type(value) is not int or not 0 <= value <= LARGEST_SEED:
            raise _wrong(where, key, value, f"an integer from 0 to {LARGEST_SEED}")
        return value
    if key == "output":
        return checked_output(value, where)
    if key == "policy":
        if not isinstance(value, (str, Mapping)) or not value:
            raise _wrong(where, key, value, "a name, a file or a mapping")
        return _plain(key, value, where)
    if key in TEXTS:
        return _text(key, value, where)
    if key in INTEGERS:
        if type(value) is not int or not 1 <= value <= INTEGERS[key]:
            raise _wrong(where, key, value, f"an integer from 1 to {INTEGERS[key]}")
        return value
    if key in NUMBERS:
        if type(value) not in (int, float) or not -1e6 <= value <= 1e6:
            raise _wrong(where, key, value, "a number from -1000000 to 1000000")
        return float(value)
    return _plain(key, value, where)


def _text(key: str, value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, key, value, "text")
    if len(value) > LONGEST_TEXT:
        raise ManifestError(f"{where}: {key} has {len(value)} characters; give at most {LONGEST_TEXT}.")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ManifestError(f"{where}: {key} holds a character that is none (NUL or half of a pair); leave it out.")
    return value


def _plain(key: str, value: Any, where: str, depth: int = 0) -> Any:
    """A value of plain data, as JSON holds it."""
    if depth > DEEPEST:
        raise ManifestError(f"{where}: {key} is nested more than {DEEPEST} deep; give a flatter value.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(key, value, where)
    if isinstance(value, (int, float)):
        if isinstance(value, float) and not math.isfinite(value):
            raise _wrong(where, key, value, "a finite number")
        if isinstance(value, int) and abs(value) >= 2**64:
            raise ManifestError(f"{where}: {key} is an integer of more than 64 bits; give a smaller one.")
        return value
    if isinstance(value, list):
        return [_plain(key, item, where, depth + 1) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise _wrong(where, key, value, "a mapping whose keys are text")
        return {_text(key, name, where): _plain(key, item, where, depth + 1) for name, item in value.items()}
    raise _wrong(where, key, value, "text, a number, true, false, a list or a mapping")


def _wrong(where: str, key: str, value: Any, wanted: str) -> ManifestError:
    return ManifestError(f"{where}: {key} is {shown(value)} ({type(value).__name__}); give {wanted}.")


def of_text(key: str, text: str) -> Any:
    """The value that a cell of a table means: text for prompts and names, else JSON where it is JSON."""
    if key in TEXTS or key in ("id", "output"):
        return text
    try:
        return json.loads(text, parse_constant=lambda word: word)
    except (ValueError, RecursionError):
        return text


def refuse_unknown(row: Mapping[str, Any], names: frozenset[str], pipeline: str, where: str) -> None:
    """Raise ManifestError where the pipeline takes no argument of a field's name. names: those that it takes."""
    for key in row:
        if key not in names and key not in OWN:
            allowed = [name for name in names if name not in _REFUSED and not _TENSORS.match(name)]
            raise ManifestError(
                f"{where}: {pipeline} takes no argument {shown(key)}; {nearest(key, [*allowed, *OWN])}."
            )


# ------------------------------------------------------------------------------------------------------------- schema


def schema() -> dict[str, Any]:
    """The published JSON Schema: of one line of a JSONL manifest, or of a whole YAML sweep."""
    properties: dict[str, Any] = {
        "id": {"type": "string", "pattern": f"^{ID.pattern}$"},
        "seed": {"type": "integer", "minimum": 0, "maximum": LARGEST_SEED},
        "policy": {"anyOf": [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/policy"}]},
        "output": {"type": "string", "minLength": 1, "maxLength": 200},
        **{key: {"type": "string", "maxLength": LONGEST_TEXT} for key in TEXTS},
        **{key: {"type": "integer", "minimum": 1, "maximum": largest} for key, largest in INTEGERS.items()},
        **{key: {"type": "number", "minimum": -1e6, "maximum": 1e6} for key in NUMBERS},
    }
    for key, meaning in OWN.items():
        properties[key]["description"] = meaning
    refused = {"anyOf": [{"enum": sorted(_REFUSED)}, {"pattern": _TENSORS.pattern}]}
    item = {
        "description": "other keys are arguments of the pipeline, by its own names",
        "type": "object",
        "propertyNames": {"pattern": "^[^\\W\\d]\\w*$", "not": refused},
        "properties": {key: {"anyOf": [value, {"type": "null"}]} for key, value in properties.items()},
    }
    grid = {
        "description": "items of all combinations; a field's values are a list",
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {
            "anyOf": [{"type": "array", "minItems": 1}, {"type": ["string", "number", "boolean"]}]
        },
    }
    sweep = {
        "type": "object",
        "additionalProperties": False,
        "anyOf": [{"required": ["grid"]}, {"required": ["items"]}],
        "properties": {
            "defaults": {"$ref": "#/$defs/item", "description": "of every item that does not say otherwise"},
            "grid": {"anyOf": [grid, {"type": "array", "minItems": 1, "items": grid}]},
            "items": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/item"}},
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dit_accel manifest: a line of a JSONL file (item), or a YAML file (sweep)",
        "anyOf": [{"$ref": "#/$defs/sweep"}, {"$ref": "#/$defs/item"}],
        "$defs": {"item": item, "sweep": sweep, "policy": {k: v for k, v in Policy.schema().items() if k != "$schema"}},
    }
