"""video: measures against numbers worked out by hand; MP4 files that hold what was asked for, or are not there."""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
import torch

from dit_accel import video
from dit_accel.errors import DitAccelError
from dit_accel.quality import QualityError, psnr
from dit_accel.video import (
    VideoError,
    flicker,
    frame_psnr,
    read_mp4,
    rgb,
    temporal_psnr,
    worst_frame_psnr,
    write_mp4,
)


def clips(*errors: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Videos [B, F, 1, 2, 2] whose error is one number in each frame, over a reference that moves."""
    frames = len(errors[0])
    b = torch.linspace(0.2, 0.6, frames, dtype=torch.float64).view(1, -1, 1, 1, 1).expand(len(errors), -1, 1, 2, 2)
    return b + torch.tensor(errors, dtype=torch.float64).view(len(errors), frames, 1, 1, 1), b


def test_every_frame_and_the_worst() -> None:
    a, b = clips([0.1, 0.01, 0.0], [0.0, 0.0, 0.0])
    assert frame_psnr(a, b).tolist() == [[pytest.approx(20), pytest.approx(40), math.inf], [math.inf] * 3]
    assert worst_frame_psnr(a, b).tolist() == [pytest.approx(20), math.inf]
    noise = torch.rand(2, 3, 3, 5, 7)
    shifted = (noise + 0.1 * torch.rand(noise.shape)).clamp(0, 1)
    assert torch.equal(frame_psnr(shifted, noise)[1], psnr(shifted[1], noise[1]))
    a[0, 1] = math.nan
    assert math.isnan(float(worst_frame_psnr(a, b)[0])), "a frame that is not finite is the worst"


def test_temporal_psnr_by_hand() -> None:
    # Changes of the error: 0.1 and 0; their mean square 0.005; an error that stands still has none.
    a, b = clips([0.0, 0.1, 0.1], [0.2, 0.2, 0.2], [0.1, -0.1, 0.1])
    expected = [-10 * math.log10(0.005), math.inf, -10 * math.log10(0.04)]
    values = temporal_psnr(a, b).tolist()
    assert values[0] == pytest.approx(expected[0]) and values[2] == pytest.approx(expected[2])
    assert values[1] > 280, "nothing but the rounding of the reference"
    assert temporal_psnr(b, b).tolist() == [math.inf] * 3


def test_unrelated_errors_cost_three_decibels_in_time() -> None:
    generator = torch.Generator().manual_seed(0)
    b = torch.rand(1, 30, 3, 16, 16, generator=generator, dtype=torch.float64)
    a = b + 0.01 * torch.randn(b.shape, generator=generator, dtype=torch.float64)
    assert float(temporal_psnr(a, b)) == pytest.approx(float(frame_psnr(a, b).mean()) - 10 * math.log10(2), abs=0.1)


def test_flicker_by_hand() -> None:
    still, growing, jumping = [0.2, 0.2, 0.2, 0.2], [0.0, 0.1, 0.2, 0.3], [0.1, -0.1, 0.1, -0.1]
    once = [0.0, 0.0, 0.1, 0.0]  # second differences 0.1 and -0.2
    a, b = clips(still, growing, jumping, once)
    assert flicker(a, b).tolist() == pytest.approx([0.0, 0.0, 0.1, 0.3 / 2 / 4], abs=1e-12)
    assert torch.equal(flicker(a, b), flicker(b, a)) and flicker(b, b).tolist() == [0.0] * 4


def test_motion_that_both_share_is_neither_flicker_nor_change() -> None:
    moving = torch.rand(1, 6, 3, 4, 4, dtype=torch.float64)
    brighter = moving + 0.1
    assert float(flicker(brighter, moving)) < 1e-15 and float(temporal_psnr(brighter, moving)) > 280


def test_half_precision_is_computed_in_double() -> None:
    a, b = torch.rand(1, 4, 3, 4, 4).bfloat16(), torch.rand(1, 4, 3, 4, 4).bfloat16()
    for measure in (frame_psnr, worst_frame_psnr, temporal_psnr, flicker):
        assert measure(a, b).dtype == torch.float64 and torch.equal(measure(a, b), measure(a.double(), b.double()))


def test_wrong_shapes_are_one_clear_sentence() -> None:
    clip = torch.rand(1, 2, 3, 4, 4)
    for measure in (frame_psnr, worst_frame_psnr, temporal_psnr, flicker):
        with pytest.raises(QualityError, match=r"\[1, 2, 3, 4, 4\] and \[1, 2, 3, 4, 3\]; give two equal shapes"):
            measure(clip, clip[..., 1:])
        with pytest.raises(QualityError, match=r"\[B, F, C, H, W\]"):
            measure(clip[0], clip[0])
    with pytest.raises(QualityError, match="temporal_psnr got videos of 1 frames; give at least 2"):
        temporal_psnr(clip[:, :1], clip[:, :1])
    with pytest.raises(QualityError, match="flicker got videos of 2 frames; give at least 3"):
        flicker(clip, clip)


# -------------------------------------------------------------------------------------------------------------- files


def moving_square(frames: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    clip = torch.full((frames, channels, height, width), 0.25)
    for index in range(frames):
        clip[index, 0, : height // 2, index % width :] = 0.9
    return clip


@pytest.mark.parametrize(
    ("shape", "fps"),
    [
        ((9, 48, 64), 16),
        ((1, 32, 32), 24),
        ((5, 31, 45), 16),
        ((4, 1, 1), 8),
        ((7, 32, 18), 23.976),
        ((3, 16, 16), 0.5),
    ],
)
def test_what_is_written_is_read_back(tmp_path: Path, shape: tuple[int, int, int], fps: float) -> None:
    clip = moving_square(*shape)
    write_mp4(tmp_path / "clip.mp4", clip, fps)
    frames, rate = read_mp4(tmp_path / "clip.mp4")
    count, height, width = shape
    assert frames.shape == (count, 3, height + height % 2, width + width % 2) and rate == pytest.approx(fps, rel=1e-6)
    # Half the colour resolution is lost, but not where the picture is, nor its brightness.
    inner = frames[..., :height, :width]
    assert float((inner - clip).abs().mean()) < 0.02
    if height % 2:
        assert float((frames[..., -1, :] - frames[..., -2, :]).abs().max()) < 0.1, "the last row stands there twice"
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").stat().st_mode & 0o777 == 0o644


def test_the_file_says_what_its_colours_mean_and_grey_works(tmp_path: Path) -> None:
    clip = moving_square(3, 32, 32, channels=1)
    write_mp4(tmp_path / "grey.mp4", clip, 16)
    with av.open(str(tmp_path / "grey.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (stream.codec_context.name, context.pix_fmt, context.colorspace) == ("h264", "yuv420p", 1)
    frames, _ = read_mp4(tmp_path / "grey.mp4")
    assert float((frames - clip).abs().max()) < 0.05


def test_pixels_that_are_not_finite_become_black() -> None:
    pixels = rgb(torch.tensor([math.nan, -math.inf, math.inf, 0.5]).view(1, 2, 2))
    assert pixels.shape == (2, 2, 3) and pixels[..., 0].flatten().tolist() == [0, 0, 255, 128]


def test_a_file_that_holds_something_else_is_an_error_and_does_not_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.mp4"
    write_mp4(path, moving_square(4, 16, 16), 16)
    before = path.read_bytes()
    encode = video._encode
    for name, spoil, message in (
        ("short", lambda p, f, h, w, r: encode(p, f[:-1], h, w, r), "asked for 6 frames .* holds 5 of 16 x 20 at 16"),
        ("small", lambda p, f, h, w, r: encode(p, f[..., :-2], h, w - 2, r), "the file holds 6 of 16 x 18 at 16"),
        ("slow", lambda p, f, h, w, r: encode(p, f, h, w, r / 2), "the file holds 6 of 16 x 20 at 8"),
        ("broken", lambda p, f, h, w, r: p.write_bytes(before[:900]), "the file holds none"),
        ("empty", lambda p, f, h, w, r: None, "cannot be read as a video"),
    ):
        monkeypatch.setattr(video, "_encode", spoil)
        for target in (path, tmp_path / f"{name}.mp4"):
            with pytest.raises(VideoError, match=message):
                write_mp4(target, moving_square(6, 16, 20), 16)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_an_interrupt_leaves_no_half_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(frames: torch.Tensor) -> Iterator[torch.Tensor]:
        yield from frames[:2]
        raise KeyboardInterrupt

    encode = video._encode
    monkeypatch.setattr(video, "_encode", lambda p, f, h, w, r: encode(p, interrupted(f), h, w, r))
    with pytest.raises(KeyboardInterrupt):
        write_mp4(tmp_path / "clip.mp4", moving_square(4, 16, 16), 16)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_or_read_is_one_sentence(tmp_path: Path) -> None:
    clip = moving_square(2, 16, 16)
    for frames, fps, message in (
        (clip[0], 16, r"got frames \[3, 16, 16\]"),
        (clip[:0], 16, "got frames"),
        (clip.repeat(1, 2, 1, 1)[:, :4], 16, "1 or 3 channels"),
        (clip, 0, "fps=0; give 0.1 to 1000"),
        (clip, math.nan, "fps=nan"),
    ):
        with pytest.raises(VideoError, match=message):
            write_mp4(tmp_path / "clip.mp4", frames, fps)
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "none.mp4"):
        with pytest.raises(DitAccelError, match=f"{name} cannot be read as a video"):
            read_mp4(tmp_path / name)


def test_only_files_need_pyav(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['av'] = None\n"
        "import torch, dit_accel.video as video, dit_accel.compare\n"
        "print(float(video.flicker(torch.ones(1, 3, 1, 2, 2), torch.zeros(1, 3, 1, 2, 2))))\n"
        f"try: video.write_mp4('{tmp_path}/a.mp4', torch.zeros(1, 3, 2, 2), 16)\n"
        "except ImportError as error: print(error.name)\n"
    )
    root = Path(video.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split() == ["0.0", "av"] and not list(tmp_path.iterdir())
