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
            fitting = (fitted for kind in allowed if (fitted := _fitted(value, kind)) is not _MISFIT)
            fitted = next(fitting, _MISFIT)
            if fitted is _MISFIT:
                names = " or ".join(_name(kind) for kind in allowed)
                raise PolicyError(f"{where} is {shown(value)} ({type(value).__name__}); give {names}.")
            if fitted is not value:
                object.__setattr__(self, field.name, fitted)
                value = fitted
            _check_range(where, value, field.metadata)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary of every field; nested settings become dictionaries, `None` stays."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(typing.cast(Any, self))}


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


_MISFIT = object()


def _fitted(value: Any, kind: Any) -> Any:
    """The value as this kind, or `_MISFIT`: whole numbers pass for floats, and lists for tuples."""
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if not isinstance(value, (tuple, list)) or (parts[-1] is not Ellipsis and len(value) != len(parts)):
            return _MISFIT
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        items = tuple(_fitted(item, part) for item, part in zip(value, kinds))
        if any(item is _MISFIT for item in items):
            return _MISFIT
        return value if type(value) is tuple and all(a is b for a, b in zip(items, value)) else items
    if kind is float and type(value) is int and abs(value) <= _LARGEST:
        return float(value)
    fits = type(value) is kind or (dataclasses.is_dataclass(kind) and isinstance(value, typing.cast(type, kind)))
    return value if fits else _MISFIT


def _name(kind: Any) -> str:
    """A kind of value in words."""
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if parts[-1] is Ellipsis:
            return f"a list of {_name(parts[0])}"
        return f"[{', '.join(_name(part) for part in parts)}]"
    return "null" if kind is types.NoneType else kind.__name__


def _check_range(where: str, value: Any, metadata: Mapping[str, Any]) -> None:
    choices, low, high = (metadata.get(key) for key in ("choices", "minimum", "maximum"))
    if choices is not None and value is not None and value not in choices:
        raise PolicyError(f"{where} is {shown(value)}; {nearest(value, choices)}.")
    if isinstance(value, tuple):
        for item in value:
            _check_range(where, item, {})
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise PolicyError(f"{where} is {value}; give a finite number.")
        if (low is not None and value < low) or (high is not None and value > high):
            limits = [
                f"{word} {limit:g}" for word, limit in (("at least", low), ("at most", high)) if limit is not None
            ]
            raise PolicyError(f"{where} is {shown(value)}; give a value of {' and '.join(limits)}.")


def fields_of(cls: type) -> list[tuple[dataclasses.Field[Any], tuple[Any, ...]]]:
    """Each field of a settings class with the types that it accepts."""
    hints = typing.get_type_hints(cls)
    return [(field, _options(hints[field.name])) for field in dataclasses.fields(cls)]


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


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
        nested: Any = next((kind for kind in known[key] if dataclasses.is_dataclass(kind)), None)
        values[key] = from_mapping(nested, value, f"{where}.{key}") if nested and value is not None else value
    return cls(**values)


def schema_of(cls: type) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a settings class."""
    properties: dict[str, Any] = {}
    for field, allowed in fields_of(cls):
        options = [_schema(kind) for kind in allowed]
        entry: dict[str, Any] = options[0] if len(options) == 1 else {"anyOf": options}
        for key, name in (("help", "description"), ("minimum", "minimum"), ("maximum", "maximum"), ("choices", "enum")):
            if field.metadata.get(key) is not None:
                value = field.metadata[key]
                entry[name] = [*value, *([None] if types.NoneType in allowed else [])] if key == "choices" else value
        properties[field.name] = entry
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _schema(kind: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(kind):
        return schema_of(typing.cast(type, kind))
    if typing.get_origin(kind) is not tuple:
        return {"type": _JSON_TYPES[kind]}
    parts = typing.get_args(kind)
    if parts[-1] is Ellipsis:
        return {"type": "array", "items": _schema(parts[0])}
    length = {"minItems": len(parts), "maxItems": len(parts)}
    return {"type": "array", "prefixItems": [_schema(part) for part in parts], **length}
