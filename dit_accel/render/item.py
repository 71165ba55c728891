"""Item: one picture or video of a manifest. Its id, seed and fingerprint depend on nothing but what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """id: unique in the manifest; seed: of its generator; arguments: of the pipeline's call; policy: a name, file or
    mapping, `None` for the render's; stem, ending: of its file below the output folder (ending `None`: by its kind);
    place: in the manifest, for messages. A resolved item also has all settings in force: arguments with the defaults,
    `policy` as data, and `fingerprint`, which is equal for items of equal pictures.
    """

    id: str
    seed: int
    arguments: Mapping[str, Any]
    policy: Any
    stem: str
    ending: str | None
    place: str
    policy_name: str = ""
    fingerprint: str = ""
    folder: str = field(default="", compare=False)  # of the manifest, where its policies' files are

    @property
    def prompt(self) -> str | None:
        return self.arguments.get("prompt")


def canonical(value: Any) -> str:
    """JSON that is equal for equal data, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(*parts: str) -> str:
    """SHA-256 of texts, in hexadecimal; the border between two texts counts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def id_of(row: Mapping[str, Any]) -> str:
    """Id of an item that gives none: 16 hexadecimal digits of the hash of what it says."""
    return digest("item", canonical(row))[:16]


def seed_of(base_seed: int, identity: str) -> int:
    """Seed of an item that gives none; 48 bits, so that every reader of JSON holds it exactly."""
    return int(digest("seed", str(base_seed), identity)[:12], 16)


def fingerprint_of(arguments: Mapping[str, Any], seed: int, policy: Any, common: Mapping[str, Any]) -> str:
    """Hash of all that decides over a picture. common: what all items share, such as the pipeline and its dtype."""
    return digest("picture", canonical([arguments, seed, policy, common]))[:32]
