"""Manifest: read the items of a batch render from JSONL, CSV or a YAML sweep; no framework is loaded for it."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from dit_accel.errors import ManifestError, nearest, shown
from dit_accel.render.fields import OWN, checked, of_text
from dit_accel.render.item import Item, id_of, seed_of
from dit_accel.render.names import default_stem, key_of, stem_and_ending

MOST_ITEMS = 1_000_000
_LARGEST = {".jsonl": 2**30, ".ndjson": 2**30, ".csv": 2**30, ".yaml": 2**22, ".yml": 2**22}  # bytes
_SWEEP = ("defaults", "grid", "items")
Row = tuple[str, dict[str, Any]]  # where it is, what it says


def load_manifest(path: str | os.PathLike[str], base_seed: int = 0) -> tuple[Item, ...]:
    """Items of a .jsonl, .csv or .yaml file, in its order.

    base_seed: the seeds of items that give none are hashes of it and their ids. Raises ManifestError: one sentence that
    names the line and the field.
    """
    path = Path(path)
    if path.suffix not in _LARGEST:
        raise ManifestError(f"{path} is no manifest; give a file that ends in .jsonl, .csv, .yaml or .yml.")
    try:
        if path.stat().st_size > _LARGEST[path.suffix]:
            raise ManifestError(f"{path} has more than {_LARGEST[path.suffix] >> 20} MiB; split it into several files.")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}; give another file.") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise ManifestError(f"{path.name}, line {line}: this is no UTF-8 text; save the file as UTF-8.") from None
    return parse_manifest(text, path.suffix, path.name, base_seed, os.fspath(path.parent))


def parse_manifest(text: str, suffix: str, name: str, base_seed: int = 0, folder: str = "") -> tuple[Item, ...]:
    """The same from text. suffix: its format, as of a file; name: for messages; folder: where policy files are."""
    read = _csv if suffix == ".csv" else _yaml if suffix in (".yaml", ".yml") else _jsonl
    return items_of(read(text, name), name, base_seed, folder)


def items_of(rows: Iterable[Row], name: str, base_seed: int = 0, folder: str = "") -> tuple[Item, ...]:
    """The same from rows, each with where it is."""
    items: list[Item] = []
    ids: dict[str, Item] = {}
    files: dict[str, Item] = {}
    for where, row in rows:
        if len(items) == MOST_ITEMS:
            raise ManifestError(f"{where}: this is item {MOST_ITEMS + 1}; give at most {MOST_ITEMS} items a file.")
        item = _item(checked(row, where), where, base_seed, folder)
        twin = ids.setdefault(item.id.casefold(), item)
        if twin is not item:
            what = f"id {shown(item.id)} is" if "id" in row else "the item is"
            raise ManifestError(f"{where}: {what} the same as on {_line(twin)}; give it an id or a seed of its own.")
        twin = files.setdefault(key_of(item.stem), item)
        if twin is not item:
            raise ManifestError(
                f"{where}: output {shown(item.stem)} is the file of {_line(twin)}, on some disks at least; "
                "give it another name."
            )
        items.append(item)
    if not items:
        raise ManifestError(f'{name}, line 1: there are no items; give at least one, such as {{"prompt": "a cat"}}.')
    return tuple(items)


def _item(row: dict[str, Any], where: str, base_seed: int, folder: str) -> Item:
    identity = row.get("id") or id_of(row)
    arguments = {key: value for key, value in row.items() if key not in OWN}
    if not arguments:
        raise ManifestError(f"{where}: the item has no prompt or other argument; give one, such as prompt.")
    stem, ending = stem_and_ending(row["output"]) if "output" in row else (None, None)
    if stem is None:
        stem = default_stem(identity, row.get("prompt"), "id" in row)
    seed = row.get("seed", seed_of(base_seed, identity))
    return Item(identity, seed, arguments, row.get("policy"), stem, ending, where, folder=folder)


def _line(item: Item) -> str:
    return item.place.rpartition(", ")[2]


# -------------------------------------------------------------------------------------------------------------- JSONL


def _jsonl(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=partial(_unique, where), parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            raise ManifestError(
                f"{where}: this is no JSON ({error.msg.lower()} at column {error.colno}); give one object a line."
            ) from None
        except (ValueError, RecursionError) as error:
            if isinstance(error, ManifestError):
                raise
            raise ManifestError(f"{where}: this cannot be read as JSON; give one object of plain values.") from None
        if not isinstance(row, dict):
            raise ManifestError(f'{where}: this is {shown(row)}; give an object such as {{"prompt": "a cat"}}.')
        yield where, row


def _unique(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise ManifestError(f"{where}: {key} is given twice; give it once.")
        row[key] = value
    return row


def _no_constant(word: str) -> Any:
    raise ValueError(word)


# ---------------------------------------------------------------------------------------------------------------- CSV


def _csv(text: str, name: str) -> Iterator[Row]:
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ManifestError(f"{name}, line {line}: there is a NUL character; save the table as plain UTF-8 text.")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    head: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            where, start = f"{name}, line {start}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if head is None:
                head = _head(cells, where)
                continue
            if len(cells) != len(head):
                raise ManifestError(
                    f"{where}: there are {len(cells)} cells under {len(head)} names; give one a name, text with commas "
                    "in quotes."
                )
            yield where, {key: of_text(key, cell) for key, cell in zip(head, cells) if cell}
    except csv.Error as error:
        raise ManifestError(f"{name}, line {start}: this is no CSV ({error}); check its quotes.") from None


def _head(cells: list[str], where: str) -> list[str]:
    head = [cell.strip() for cell in cells]
    for number, key in enumerate(head):
        if not key.isidentifier():
            raise ManifestError(f"{where}: column {number + 1} is called {shown(key)}; give a field, such as prompt.")
        if key in head[:number]:
            raise ManifestError(f"{where}: {key} is the name of two columns; give it once.")
    return head


# --------------------------------------------------------------------------------------------------------------- YAML


def _yaml(text: str, name: str) -> Iterator[Row]:
    sweep, lines = _tree(text, name)
    if not isinstance(sweep, dict):
        raise ManifestError(f"{name}, line 1: this is {shown(sweep)}; give a mapping of grid, defaults and items.")
    for key in sweep:
        if key not in _SWEEP:
            where = f"{name}, line {lines.get((key,), 1)}"
            raise ManifestError(f"{where}: a sweep has no part {shown(key)}; {nearest(str(key), _SWEEP)}.")
    defaults = sweep.get("defaults") or {}
    where = f"{name}, line {lines.get(('defaults',), 1)}"
    if not isinstance(defaults, dict) or {"id", "output"} & defaults.keys():
        raise ManifestError(
            f"{where}: defaults are {shown(defaults)}; give a mapping of fields, without id and output."
        )
    defaults = checked(defaults, where)
    grids, items = sweep.get("grid") or [], sweep.get("items") or []
    if isinstance(grids, dict):
        yield from _grid(grids, defaults, ("grid",), name, lines)
    else:
        for number, grid in enumerate(_list(grids, "grid", name, lines)):
            yield from _grid(grid, defaults, ("grid", number), name, lines)
    for number, row in enumerate(_list(items, "items", name, lines)):
        where = f"{name}, line {lines.get(('items', number), 1)}"
        if not isinstance(row, dict):
            raise ManifestError(f"{where}: an item is {shown(row)}; give a mapping of fields, such as prompt: a cat.")
        yield where, defaults | row


def _list(value: Any, part: str, name: str, lines: Mapping[tuple, int]) -> list[Any]:
    if not isinstance(value, list):
        where = f"{name}, line {lines.get((part,), 1)}"
        raise ManifestError(f"{where}: {part} is {shown(value)}; give a list of mappings.")
    return value


def _grid(grid: Any, defaults: dict[str, Any], path: tuple, name: str, lines: Mapping[tuple, int]) -> Iterator[Row]:
    where = f"{name}, line {lines.get(path, 1)}"
    if not isinstance(grid, dict) or not grid:
        raise ManifestError(f"{where}: a grid is {shown(grid)}; give a mapping from fields to lists of values.")
    values: list[list[Any]] = []
    for key, given in grid.items():
        line = f"{name}, line {lines.get((*path, key), 1)}"
        listed = given if isinstance(given, list) else [given]
        if not listed or (key in ("id", "output") and len(grid) > 1):
            reason = "has no values" if not listed else "cannot be combined with other fields"
            raise ManifestError(f"{line}: {key} {reason} in a grid; give a list of values, or leave it out.")
        values.append([checked({key: value}, line).get(key) for value in listed])
    count = math.prod(map(len, values))
    if count > MOST_ITEMS:
        raise ManifestError(f"{where}: the grid has {count} items; give at most {MOST_ITEMS}.")
    for combination in product(*values):
        yield where, defaults | dict(zip(grid, combination))


def _tree(text: str, name: str) -> tuple[Any, dict[tuple, int]]:
    """What a YAML text holds, and the line of each mapping key and list entry, by its path."""
    kind: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    lines: dict[tuple, int] = {}
    try:
        for event in yaml.parse(text, Loader=kind):
            if isinstance(event, yaml.AliasEvent):  # a few of them in one another make gigabytes
                line = event.start_mark.line + 1
                raise ManifestError(f"{name}, line {line}: there is an alias (*); write the value out.")
        loader = kind(text)
        try:
            node = loader.get_single_node()
            _note_lines(node, (), lines, name)
            return (None if node is None else loader.construct_document(node)), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        problem = " ".join(str(error.problem or error.context).split())
        raise ManifestError(f"{name}, line {line}: this is no YAML of plain values ({problem}); correct it.") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{name}, line 1: this cannot be read as YAML; give text of plain values.") from None


def _note_lines(node: Any, path: tuple, lines: dict[tuple, int], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value if isinstance(key.value, str) else None)
            if here in lines:
                line = key.start_mark.line + 1
                raise ManifestError(f"{name}, line {line}: {here[-1]} is given twice; give it once.")
            lines[here] = key.start_mark.line + 1
            _note_lines(value, here, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[(*path, number)] = value.start_mark.line + 1
            _note_lines(value, (*path, number), lines, name)
