"""Writer: one item's picture with what it was made of inside, and a sidecar beside it that says more.

The picture's bytes depend on nothing but the item and the library versions. The sidecar does so too, except for its
part `made`, which has all that may differ from one render to the next.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from dit_accel import __version__
from dit_accel.render.batching import Rendered
from dit_accel.render.item import Item
from dit_accel.render.ledger import DONE, Entry
from dit_accel.render.settings import RenderSettings
from dit_accel.render.storage import place_of, put, storing, sync_folder
from dit_accel.video import VideoError, rgb, write_mp4

_LONGEST_PARAMETERS = 2000  # characters of other arguments in a picture's text for people


@functools.cache
def versions() -> dict[str, str]:
    """Of what a picture depends on."""
    found = {"dit_accel": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "pillow", "av"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe(item: Item, settings: RenderSettings) -> dict[str, Any]:
    """What a picture is made of, and could be made of again."""
    return {
        "id": item.id,
        "seed": item.seed,
        "arguments": dict(item.arguments),
        "policy": item.policy_name,
        "policy_settings": item.policy,
        "pipeline": os.path.basename(os.path.normpath(settings.pipeline)),
        "dtype": settings.dtype,
        "fingerprint": item.fingerprint,
        "versions": versions(),
    }


@dataclass(frozen=True)
class Measured:
    """work: blocks run and skipped, by the session's count; fidelity: distance from the plain pipeline's picture."""

    work: Mapping[str, Any] | None = None
    fidelity: Mapping[str, Any] | None = None


class Writer:
    """Writes the files of one worker. temporary: an empty folder on the disk of the output folder."""

    def __init__(self, settings: RenderSettings, temporary: Path, worker: str):
        self.settings, self.temporary, self.worker = settings, temporary, worker
        self.out = Path(settings.out)

    def write(self, rendered: Rendered, measured: Measured, attempt: int) -> Entry:
        """The finished files of an item, and the entry for the ledger. Raises StorageError, VideoError."""
        item, picture = rendered.item, rendered.picture
        assert picture is not None
        ending = ".mp4" if picture.ndim == 4 else ".png"
        file = item.stem + ending
        path = place_of(self.out, file)
        description = describe(item, self.settings)
        content = self.temporary / f"picture{ending}"
        with storing(path):
            encode(content, picture, description, self.settings.fps)
            data = content.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        height, width = picture.shape[-2:]
        sidecar = description | {
            "file": file,
            "sha256": sha256,
            "height": height,
            "width": width,
            "frames": picture.shape[0] if picture.ndim == 4 else 1,
            "made": {
                "seconds": round(rendered.seconds, 4),
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "batch": rendered.batch,
                "tiled_vae": rendered.tiled,
                "worker": self.worker,
                "host": socket.gethostname(),
                "threads": torch.get_num_threads(),
                "attempt": attempt,
            },
        }
        if measured.work is not None:
            sidecar["work"] = measured.work
        if measured.fidelity is not None:
            sidecar["fidelity"] = measured.fidelity
        beside = self.temporary / "sidecar.json"
        with storing(path):
            beside.write_text(json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        put(beside, path.with_name(path.name[: -len(ending)] + ".json"))
        put(content, path)
        sync_folder(path.parent)
        return Entry(
            item.id,
            DONE,
            self.settings.run,
            item.fingerprint,
            file,
            len(data),
            sha256,
            attempt=attempt,
            seconds=rendered.seconds,
            batch=rendered.batch,
            worker=self.worker,
        )


def encode(path: Path, picture: torch.Tensor, description: Mapping[str, Any], fps: float) -> None:
    """Write an image [C, H, W] as PNG or a video [F, C, H, W] as MP4, with its description inside."""
    if picture.ndim == 4:
        write_mp4(path, picture, fps)
        _add_comment(path, json.dumps(description, ensure_ascii=False))
        return
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", parameters_of(description))
    text.add_itxt("dit_accel", json.dumps(description, ensure_ascii=False))
    Image.fromarray(rgb(picture)).save(path, format="PNG", pnginfo=text)


def parameters_of(description: Mapping[str, Any]) -> str:
    """What a picture was made of as other programs show it: prompts, then settings."""
    arguments = dict(description["arguments"])
    lines = [str(arguments.pop("prompt", ""))]
    if arguments.get("negative_prompt"):
        lines.append(f"Negative prompt: {arguments.pop('negative_prompt')}")
    named = {"Steps": "num_inference_steps", "CFG scale": "guidance_scale"}
    settings = {word: arguments.pop(key) for word, key in named.items() if key in arguments}
    size = {"Size": f"{arguments['width']}x{arguments['height']}"} if {"width", "height"} <= arguments.keys() else {}
    settings |= {"Seed": description["seed"]} | size | {"Model": description["pipeline"]} | arguments
    lines.append(", ".join(f"{key}: {value}" for key, value in settings.items())[:_LONGEST_PARAMETERS])
    return "\n".join(lines)


def _add_comment(path: Path, comment: str) -> None:
    """Give an MP4 file a comment; its pictures are copied as they are."""
    import av

    target = path.with_name("commented.mp4")
    packets = 0
    try:
        with av.open(os.fspath(path)) as source, av.open(os.fspath(target), "w", format="mp4") as copy:
            copy.metadata["comment"] = comment
            video = source.streams.video[0]
            stream = copy.add_stream_from_template(video)
            for packet in source.demux(video):
                if packet.dts is not None:
                    packet.stream = stream
                    copy.mux(packet)
                    packets += 1
        with av.open(os.fspath(target)) as written:
            whole = written.streams.video[0].frames == packets and written.metadata.get("comment") == comment
    except av.FFmpegError as error:
        target.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk, for one
            raise
        raise VideoError(f"{path.name} did not come out whole ({error.strerror}).") from error
    if not whole:
        target.unlink(missing_ok=True)
        raise VideoError(f"{path.name} did not come out whole; try again, or report it.")
    os.replace(target, path)
