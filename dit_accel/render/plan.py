"""Plan: what is still to be made, from the manifest and the ledgers alone; no framework is loaded for it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError, ManifestError, PolicyError
from dit_accel.policy import as_policy
from dit_accel.render.fields import refuse_unknown
from dit_accel.render.item import Item, canonical, digest, fingerprint_of
from dit_accel.render.ledger import DONE, FAILED, FORGOTTEN, Entry, History
from dit_accel.render.signature import Signature

_WEIGHTS = (".safetensors", ".json", ".txt", ".model")


@dataclass(frozen=True)
class Plan:
    """todo: items to make, in the manifest's order; done, failed: entries of others, by id; strangers: items of the
    ledger that the manifest no longer has; adopted: files found whole that a crash kept out of the ledger."""

    todo: tuple[Item, ...]
    done: Mapping[str, Entry]
    failed: Mapping[str, Entry]
    strangers: int
    adopted: tuple[Entry, ...]
    forgotten: tuple[Item, ...]


def resolve(
    items: Sequence[Item], policy: Any, defaults: Mapping[str, Any], common: Mapping[str, Any], signature: Signature
) -> tuple[Item, ...]:
    """Items with all settings in force. policy: of those that give none; defaults: call arguments of those that do not
    say otherwise; common: what else decides over every picture.

    Raises ManifestError for a policy or an argument that is not allowed.
    """
    known: dict[str, dict[str, Any] | None] = {}
    resolved: list[Item] = []
    for item in items:
        if signature.names is not None:
            refuse_unknown(item.arguments, signature.names, signature.class_name, item.place)
    for item in items:
        given = policy if item.policy is None else item.policy
        data = known_policy(given, item.folder if item.policy is not None else "", known, item.place)
        arguments = {**defaults, **item.arguments}
        if "class_labels" in defaults and "prompt" in item.arguments:
            del arguments["class_labels"]  # the prompt says which
        if (
            signature.names is not None
            and "prompt" in signature.names
            and not {"prompt", "class_labels"} & {*arguments}
        ):
            raise ManifestError(f"{item.place}: prompt is missing; give one, or an empty text for none.")
        name = given if isinstance(given, str) else ("none" if given is None else "own")
        fingerprint = fingerprint_of(arguments, item.seed, data, common)
        resolved.append(replace(item, arguments=arguments, policy=data, policy_name=name, fingerprint=fingerprint))
    return tuple(resolved)


def known_policy(given: Any, folder: str, known: dict[str, dict[str, Any] | None], where: str) -> dict[str, Any] | None:
    """A policy as data; each is read once. `None` is the plain pipeline."""
    key = canonical([folder, given])
    if key not in known:
        if isinstance(given, str) and given.endswith((".json", ".yaml", ".yml")) and folder:
            given = os.path.join(folder, given)
        try:
            known[key] = None if given is None else as_policy(given).to_dict()
        except PolicyError as error:
            raise ManifestError(f"{where}: policy is not allowed: {error}") from None
    return known[key]


def identity_of(pipeline: str | os.PathLike[str]) -> str:
    """What tells a pipeline from another: of a folder, hashes of its settings and the sizes of its weights; of a hub
    id, the id."""
    root = Path(pipeline)
    if not root.is_dir():
        return os.fspath(pipeline)
    parts: list[str] = []
    files = [path for path in root.glob("*.json") if "index" in path.name]
    files += [path for folder in root.iterdir() if folder.is_dir() for path in folder.iterdir()]
    for path in sorted(files):
        if path.suffix in _WEIGHTS and path.is_file() and path.parent.name != "results":
            size = path.stat().st_size
            content = hashlib.sha256(path.read_bytes()).hexdigest() if size < 2**16 else ""
            parts.append(f"{path.relative_to(root).as_posix()} {size} {content}")
    return digest(*parts)[:32]


def make_plan(
    items: Sequence[Item],
    history: History,
    out: Path,
    *,
    overwrite: bool = False,
    retry_failed: bool = False,
    run: int = 1,
    ending: str | None = None,
) -> Plan:
    """Decide for each item. overwrite: make all again, also those with other settings than before; retry_failed: also
    those that failed; run: number of the coming render; ending: of the files, where it is known.

    Raises ManifestError where an item of the same id was made with other settings, and is not to be overwritten.
    """
    todo: list[Item] = []
    done: dict[str, Entry] = {}
    failed: dict[str, Entry] = {}
    adopted: list[Entry] = []
    forgotten: list[Item] = []
    for item in items:
        entry = history.entries.get(item.id)
        if overwrite:
            forgotten += [item] if entry is not None and entry.state != FORGOTTEN else []
            todo.append(item)
            continue
        if entry is None or entry.state == FORGOTTEN:
            found = _whole(item, out, run) if entry is None else None
            if found is not None:
                adopted.append(found)
                done[item.id] = found
            else:
                todo.append(item)
        elif entry.fingerprint != item.fingerprint:
            raise ManifestError(
                f"{item.place}: id {item.id!r} was rendered into {out} with other settings (arguments, seed, policy, "
                "pipeline or dtype); give --overwrite to make all items again, or another --out."
            )
        elif entry.state == DONE and stands(out, item, entry, ending):
            done[item.id] = entry
        elif entry.state == FAILED and not retry_failed:
            failed[item.id] = entry
        else:
            todo.append(item)
    ids = {item.id for item in items}
    strangers = sum(entry.state != FORGOTTEN for key, entry in history.entries.items() if key not in ids)
    return Plan(tuple(todo), done, failed, strangers, tuple(adopted), tuple(forgotten))


def stands(out: Path, item: Item, entry: Entry, ending: str | None = None) -> bool:
    """True where the file of a finished item is there, whole and under the name that it is to have."""
    stem, dot, found = entry.file.rpartition(".")
    if stem != item.stem or not dot or (item.ending or ending) not in (None, f".{found}"):
        return False
    try:
        return (out / entry.file).stat().st_size == entry.size and (out / f"{stem}.json").is_file()
    except OSError:
        return False


def _whole(item: Item, out: Path, run: int) -> Entry | None:
    """The entry of an item whose files are there and whole, though no ledger names them."""
    path = out / f"{item.stem}.json"
    try:
        data = json.loads(path.read_bytes())
        file = out / data["file"]
        if data["id"] != item.id or data["fingerprint"] != item.fingerprint or file.with_suffix(".json") != path:
            return None
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != data["sha256"]:
            return None
        return Entry(item.id, DONE, run, item.fingerprint, data["file"], len(content), data["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def of_shard(items: Iterable[Item], shard: tuple[int, int]) -> tuple[Item, ...]:
    """The items of one of several parts, by their ids: the same whatever the order of the manifest."""
    number, count = shard
    ordered = {item.id: place for place, item in enumerate(sorted(items, key=lambda item: digest("shard", item.id)))}
    return tuple(item for item in items if ordered[item.id] % count == number)


def parse_shard(word: str) -> tuple[int, int]:
    """ "1/4" is the second of four parts, which are 0/4 to 3/4."""
    first, slash, second = word.partition("/")
    if slash and first.isdecimal() and second.isdecimal() and 0 <= int(first) < int(second) <= 100_000:
        return int(first), int(second)
    raise DitAccelError(f"--shard {word} is no part; give I/N with I from 0 to N - 1, such as 0/4.")
