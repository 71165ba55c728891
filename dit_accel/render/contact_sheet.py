"""Contact sheet: one HTML file with a small picture of every item, readable from any disk and without a network."""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from dit_accel.render.item import Item
from dit_accel.render.ledger import DONE, FAILED, Entry, History
from dit_accel.render.lock import exclusive
from dit_accel.render.progress import duration
from dit_accel.render.storage import ours, put, storing

NAME = "contact-sheet.html"
MOST = 2000  # pictures of one sheet, about 20 MB
_SIDE = 192  # pixels
_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:2em;background:#fff;color:#222}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(12em,1fr));gap:1.2em}
figure{margin:0}figure img{width:100%;image-rendering:auto;background:#eee}
figcaption{overflow-wrap:anywhere}small{color:#555}.failed{border:2px solid #b00;padding:.5em}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}small{color:#aaa}figure img{background:#333}}
"""


def write_contact_sheet(out: Path, items: Sequence[Item], title: str) -> Path:
    """Write contact-sheet.html into the output folder, from the ledgers and sidecars; whole or not at all.

    Several parts of a render may end at once: each reads and writes while the others wait, so the last one has all.
    """
    path = out / NAME
    with exclusive(ours(out) / "sheet-lock"):
        entries = History.read(out).entries
        shown = [item for item in items if item.id in entries][:MOST]
        figures = [_figure(out, item, entries[item.id]) for item in shown]
        states = [entries[item.id].state for item in items if item.id in entries]
        line = f"{states.count(DONE)} of {len(items)} items, {states.count(FAILED)} failed"
        if len(shown) < len(states):
            line += f"; the first {MOST} are shown"
        text = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{line}</p>"
            f"<main>{''.join(figures)}</main></html>\n"
        )
        temporary = ours(out) / "sheet.tmp"
        with storing(path):
            temporary.write_text(text, encoding="utf-8")
        put(temporary, path)
    return path


def _figure(out: Path, item: Item, entry: Entry) -> str:
    caption = html.escape(item.prompt or item.id)
    policy = item.policy_name
    if entry.state != DONE:
        error = html.escape(entry.error or "not made")
        return f'<figure class="failed"><figcaption>{caption}<br><small>{error}</small></figcaption></figure>'
    link = quote(entry.file)
    details = [f"seed {item.seed}", policy, duration(entry.seconds), *_measures(out / entry.file)]
    source = _thumbnail(os.fspath(out / entry.file), entry.sha256)
    picture = f'<img alt="" loading="lazy" src="{source}">' if source else html.escape(entry.file)
    small = html.escape(", ".join(details))
    return (
        f'<figure><a href="{link}">{picture}</a><figcaption>{caption}<br><small>{small}</small></figcaption></figure>'
    )


def _measures(path: Path) -> list[str]:
    """What the sidecar tells of an item's cost and fidelity."""
    try:
        data = json.loads(path.with_name(path.name[:-4] + ".json").read_bytes())
        work, fidelity = data.get("work"), data.get("fidelity")
        found = [f"FLOPs {work['flops_share']:.3f}"] if work else []
        if fidelity:
            found.append("identical to plain" if fidelity["identical"] else f"{fidelity['psnr']:.1f} dB to plain")
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return found


@functools.lru_cache(maxsize=MOST)
def _thumbnail(path: str, sha256: str) -> str:
    """A small JPEG as a data address; of a video its middle frame; empty where the file cannot be read."""
    del sha256  # another content is another thumbnail
    try:
        image = _middle_frame(path) if path.endswith(".mp4") else Image.open(path).convert("RGB")
        if image is None:
            return ""
        image.thumbnail((_SIDE, _SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
    except (OSError, ValueError, ImportError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _middle_frame(path: str) -> Image.Image | None:
    import av

    with av.open(path) as container:
        frames = list(container.decode(video=0))
        return frames[len(frames) // 2].to_image() if frames else None
