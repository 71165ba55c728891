"""Video: measures that see time, and MP4 files that are read back before they count as written.

Each measure is of videos a, b [B, F, C, H, W] in [0, 1], b the reference, and gives one float64 a video or frame; the
error e is a - b. An error that stands still is seen by the PSNR of frames alone, one that moves by the others as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.files import replacing
from dit_accel.quality import QualityError, psnr


class VideoError(DitAccelError, ValueError):
    """Frames that cannot be written as a video, or a video file that cannot be read or does not hold them."""


def frame_psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB of each frame -> [B, F]; identical frames give inf."""
    _check_videos("frame_psnr", a, b, 1)
    return psnr(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def worst_frame_psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB of the worst frame of each video -> [B]; NaN if any frame is not finite."""
    return frame_psnr(a, b).amin(dim=1)  # hands NaN on


def temporal_psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB of the changes x[t + 1] - x[t] from frame to frame -> [B]; inf where the error stands still.

    The peak is 1, that of frames, so that it can be held against the PSNR of the frames: errors that have nothing to do
    with each other from frame to frame make it 3 dB lower, errors that change slowly make it much higher.
    """
    _check_videos("temporal_psnr", a, b, 2)
    errors = [x.double() - y.double() for x, y in zip(a, b)]
    return -10 * torch.log10(torch.stack([error.diff(dim=0).square().mean() for error in errors]))


def flicker(a: Tensor, b: Tensor) -> Tensor:
    """Unrest that a has and b has not -> [B]: the mean of |e[t - 1] - 2 e[t] + e[t + 1]| / 4, in units of the peak.

    0 for an error that stands still or grows evenly; d for one that jumps between +d and -d from frame to frame. The
    second difference is used for the reason given for MEMSASD (SPIE 7744, 77440V, 2010): the first one takes every
    smooth change for unrest. Of the error, not of the video, so that motion which both share is none.
    """
    _check_videos("flicker", a, b, 3)
    errors = [x.double() - y.double() for x, y in zip(a, b)]
    return torch.stack([error.diff(n=2, dim=0).abs().mean() / 4 for error in errors])


def _check_videos(name: str, a: Tensor, b: Tensor, frames: int) -> None:
    if a.ndim != 5 or a.shape != b.shape or not a.numel():
        raise QualityError(
            f"{name} got videos of shapes {list(a.shape)} and {list(b.shape)}; give two equal shapes [B, F, C, H, W]."
        )
    if a.shape[1] < frames:
        raise QualityError(f"{name} got videos of {a.shape[1]} frames; give at least {frames}.")


# -------------------------------------------------------------------------------------------------------------- files


def write_mp4(path: str | os.PathLike[str], frames: Tensor, fps: float) -> None:
    """Write frames [F, C, H, W] in [0, 1], one or three channels, as H.264 that players and browsers show.

    Such files have even sides (4:2:0), so an odd size gets its last row or column twice. The new file is read back
    before it takes its place: where frame count, size or frame rate are not those asked for, there is none.
    Raises VideoError; ImportError without PyAV, the extra `video`.
    """
    if frames.ndim != 4 or frames.shape[1] not in (1, 3) or not frames.numel():
        raise VideoError(f"write_mp4 got frames {list(frames.shape)}; give [F, C, H, W] with 1 or 3 channels.")
    if not 0.1 <= fps <= 1000:
        raise VideoError(f"write_mp4 got fps={fps}; give 0.1 to 1000 frames a second, such as 16.")
    rate = Fraction(fps).limit_denominator(1001)  # as such files hold it
    height, width = (side + side % 2 for side in frames.shape[-2:])
    with replacing(path) as temporary:
        _encode(temporary, frames, height, width, rate)
        decoder = _Decoder(temporary)
        found = [frame.shape[:2] for frame in decoder]
        if found != [(height, width)] * len(frames) or decoder.rate != rate:
            sizes = ", ".join(f"{h} x {w}" for h, w in dict.fromkeys(found))
            raise VideoError(
                f"{path} was not written: asked for {len(frames)} frames of {height} x {width} at {rate} a second, but "
                f"the file holds {f'{len(found)} of {sizes} at {decoder.rate}' if found else 'none'}."
            )


def read_mp4(path: str | os.PathLike[str]) -> tuple[Tensor, float]:
    """Frames [F, 3, H, W], float32 in [0, 1], and frames a second. Raises VideoError; ImportError without PyAV."""
    decoder = _Decoder(path)
    frames = [torch.from_numpy(frame) for frame in decoder]
    if not frames or decoder.rate is None:
        raise VideoError(f"{path} holds no frames; give a video file.")
    return torch.stack(frames).movedim(-1, 1).float() / 255, float(decoder.rate)


def rgb(image: Tensor) -> np.ndarray:
    """Image [C, H, W] in [0, 1], one or three channels -> bytes [H, W, 3]; values that are not finite become black."""
    levels = (torch.nan_to_num(image.float(), posinf=1.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()


def _encode(path: Path, frames: Tensor, height: int, width: int, rate: Fraction) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12"})  # can hardly be told from the frames
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Said in the file, or each player guesses the colours' meaning anew.
        context = stream.codec_context
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709
        for image in frames:
            pixels = rgb(image)
            padding = (0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0)
            frame = av.VideoFrame.from_ndarray(np.pad(pixels, padding, mode="edge"), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class _Decoder:
    """Iterates over the frames of a file, bytes [H, W, 3]. rate: frames a second, as the file says."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path
        self.rate: Fraction | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        import av

        try:
            with av.open(os.fspath(self.path)) as container:
                for stream in container.streams.video[:1]:
                    self.rate = stream.average_rate
                    for frame in container.decode(stream):
                        yield frame.to_ndarray(format="rgb24")
        except av.FFmpegError as error:
            raise VideoError(f"{self.path} cannot be read as a video: {error.strerror}.") from error
