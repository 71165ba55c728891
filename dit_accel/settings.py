"""Settings as frozen dataclasses: one declaration gives validation, dictionaries, JSON Schema and help texts."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from dit_accel.errors import PolicyError, nearest, shown

T = TypeVar("T")
_LARGEST = sys.float_info.max
_JSON_TYPES = {float: "number", int: "integer", str: "string", bool: "boolean", types.NoneType: "null"}


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field with its effect, its sensible range and its allowed values."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """Base of the settings dataclasses: checks every field on construction."""

    def __post_init__(self) -> None:
        for field, allowed in fields_of(type(self)):
            value = getattr(self, field.name)
            where = f"{type(self).__name__}.{field.name}"
            if type(value) is int and float in allowed and int not in allowed and abs(value) <= _LARGEST:
                value = float(value)
                object.__setattr__(self, field.name, value)
            if not any(
                type(value) is kind or (dataclasses.is_dataclass(kind) and isinstance(value, kind)) for kind in allowed
            ):
                names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in allowed)
                raise PolicyError(f"{where} is {shown(value)} ({type(value).__name__}); give {names}.")
            _check_range(where, value, field.metadata)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary of every field; nested settings become dictionaries, `None` stays."""
        return {
            field.name: value.to_dict() if isinstance(value := getattr(self, field.name), Settings) else value
            for field in dataclasses.fields(typing.cast(Any, self))
        }


def _check_range(where: str, value: Any, metadata: Mapping[str, Any]) -> None:
    choices, low, high = (metadata.get(key) for key in ("choices", "minimum", "maximum"))
    if choices is not None and value is not None and value not in choices:
        raise PolicyError(f"{where} is {shown(value)}; {nearest(value, choices)}.")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise PolicyError(f"{where} is {value}; give a finite number.")
        if (low is not None and value < low) or (high is not None and value > high):
            limits = [
                f"{word} {limit:g}" for word, limit in (("at least", low), ("at most", high)) if limit is not None
            ]
            raise PolicyError(f"{where} is {shown(value)}; give a value of {' and '.join(limits)}.")


def fields_of(cls: type) -> list[tuple[dataclasses.Field[Any], tuple[type, ...]]]:
    """Each field of a settings class with the types that it accepts."""
    hints = typing.get_type_hints(cls)
    return [(field, typing.get_args(hints[field.name]) or (hints[field.name],)) for field in dataclasses.fields(cls)]


def from_mapping(cls: type[T], data: Any, where: str = "") -> T:
    """Build a settings object from a mapping; an unknown key is an error that names the nearest known one."""
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise PolicyError(
            f"{where} is {shown(data)}; give a mapping of {', '.join(f.name for f, _ in fields_of(cls))}."
        )
    known = {field.name: allowed for field, allowed in fields_of(cls)}
    values = {}
    for key, value in data.items():
        if key not in known:
            raise PolicyError(f"{where} has no setting {shown(key)}; {nearest(str(key), known)}.")
        nested = next((kind for kind in known[key] if dataclasses.is_dataclass(kind)), None)
        values[key] = from_mapping(nested, value, f"{where}.{key}") if nested and value is not None else value
    return cls(**values)


def schema_of(cls: type) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a settings class."""
    properties: dict[str, Any] = {}
    for field, allowed in fields_of(cls):
        options = [
            schema_of(kind) if dataclasses.is_dataclass(kind) else {"type": _JSON_TYPES[kind]} for kind in allowed
        ]
        entry: dict[str, Any] = options[0] if len(options) == 1 else {"anyOf": options}
        for key, name in (("help", "description"), ("minimum", "minimum"), ("maximum", "maximum"), ("choices", "enum")):
            if field.metadata.get(key) is not None:
                entry[name] = list(field.metadata[key]) if key == "choices" else field.metadata[key]
        properties[field.name] = entry
    return {"type": "object", "additionalProperties": False, "properties": properties}
