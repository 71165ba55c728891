"""Prompt list: text that a visitor uploads or pastes -> rows of a manifest of `dit-accel render`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_accel.errors import ArgumentError
from dit_accel.render.manifest import parse_manifest
from dit_accel.studio.catalogue import Model
from dit_accel.studio.limits import Limits
from dit_accel.studio.wanted import wanted

_NAMES = {
    "prompt": "prompt",
    "seed": "seed",
    "num_inference_steps": "steps",
    "height": "height",
    "width": "width",
    "num_frames": "frames",
}


def rows_of(given: Any, name: str, model: Model, limits: Limits, steps: Any, policy: Any) -> list[dict[str, Any]]:
    """Rows, each checked as if it were asked for alone.

    given: one prompt a line, or the text of a .jsonl or .csv manifest; name: of its file, "" for pasted text, whose
    lines are prompts unless they are JSON. Raises ArgumentError, ManifestError, PolicyError.
    """
    if not isinstance(given, str) or not given.strip():
        raise ArgumentError("The list is empty; give one prompt a line, or a .jsonl or .csv manifest.")
    if len(given.encode("utf-8", "replace")) > limits.list_bytes:
        raise ArgumentError(f"The list has more than {limits.list_bytes} bytes; split it.")
    suffix = "." + name.rpartition(".")[2].lower() if "." in name else ""
    if suffix in (".yaml", ".yml"):
        raise ArgumentError("The studio reads .txt, .jsonl and .csv; for a YAML sweep use `dit-accel render`.")
    if suffix == ".csv" or suffix in (".jsonl", ".ndjson") or given.lstrip().startswith("{"):
        items = parse_manifest(given, ".csv" if suffix == ".csv" else ".jsonl", name or "list")
        rows = [dict(item.arguments) | {"seed": item.seed, "policy": item.policy} for item in items]
    else:
        lines = [line.strip() for line in given.splitlines() if line.strip()]
        rows = [{"prompt": line, "seed": number} for number, line in enumerate(lines)]
    if len(rows) > limits.items:
        raise ArgumentError(f"The list has {len(rows)} items; give at most {limits.items}.")
    return [_row(row, number, model, limits, steps, policy) for number, row in enumerate(rows, 1)]


def _row(
    given: Mapping[str, Any], number: int, model: Model, limits: Limits, steps: Any, policy: Any
) -> dict[str, Any]:
    row = {name: value for name, value in given.items() if value is not None}
    asked: dict[str, Any] = {"prompt": "", "seed": 0, "steps": steps, "policy": row.pop("policy", policy)}
    guidance = {} if model.guidance is None else {model.guidance: "guidance"}
    for name, value in row.items():
        if name not in {**_NAMES, **guidance}:
            allowed = ", ".join([*_NAMES, *guidance])
            raise ArgumentError(f"Item {number} sets {name}, which a list in the studio may not; allowed: {allowed}.")
        asked[(_NAMES | guidance)[name]] = value
    try:
        checked = wanted(model, limits, **asked)
    except ArgumentError as error:
        raise ArgumentError(f"Item {number}: {error}") from None
    return checked.row | {"policy": checked.policy_name or checked.policy.to_dict(), "id": f"item-{number:04d}"}
