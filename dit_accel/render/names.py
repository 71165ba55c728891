"""Names: of items' files. None leaves the output folder, none is another's, and all can be stored everywhere."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from dit_accel.errors import ManifestError, shown

ENDINGS = (".png", ".mp4")
_LONGEST, _LONGEST_PART = 200, 100  # bytes of a whole name and of each part of it
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # what Windows keeps for itself
_SURROGATE = re.compile("[\ud800-\udfff]")


def checked_output(value: Any, where: str) -> str:
    """A file's name below the output folder, in NFC, its ending as given. Raises ManifestError."""
    if not isinstance(value, str):
        raise ManifestError(
            f"{where}: output is {shown(value)} ({type(value).__name__}); give a name such as cats/one."
        )
    reason = _why_not(value)
    if reason is not None:
        raise ManifestError(f"{where}: output {shown(value)} {reason}; give a name such as cats/one or cats/one.png.")
    return unicodedata.normalize("NFC", value)


def _why_not(value: str) -> str | None:
    if not value or value.startswith(("/", "~")):
        return "is empty" if not value else "is not below the output folder"
    if _FORBIDDEN.search(value) or _SURROGATE.search(value):
        return "has a character that not every disk can store"
    if len(value.encode()) > _LONGEST:
        return f"is longer than {_LONGEST} bytes"
    parts = value.split("/")
    for number, part in enumerate(parts):
        if not part or part.startswith(".") or part.endswith((".", " ")) or part != part.strip():
            return f"has the part {part!r}, which leads elsewhere or hides"
        if _DEVICES.fullmatch(part):
            return f"has the part {part!r}, which is a device on Windows"
        if len(part.encode()) > _LONGEST_PART:
            return f"has a part of more than {_LONGEST_PART} bytes"
        if number < len(parts) - 1 and part.lower().endswith((*ENDINGS, ".json")):
            return f"has the folder {part!r}, which looks like a file"
    return "is an ending only" if parts[-1].lower() in ENDINGS else None


def stem_and_ending(output: str) -> tuple[str, str | None]:
    """A name without its ending, and the ending; another ending than .png or .mp4 is part of the name."""
    ending = output[-4:].lower()
    return (output[:-4], ending) if ending in ENDINGS else (output, None)


def key_of(stem: str) -> str:
    """Equal for names that some disk takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())


def default_stem(identity: str, prompt: str | None, given: bool) -> str:
    """The name of an item without one. given: the id was; else the prompt's first words make it readable."""
    if given or not prompt:
        return f"{identity}_" if _DEVICES.fullmatch(identity) or identity.endswith(".") else identity
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_only.lower()).strip("-")[:40].strip("-")
    return f"{slug}-{identity}" if slug else identity
