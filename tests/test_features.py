"""features: what is saved comes back, what is wrong is refused, captions are read, the shipped classifiers know."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_accel.errors import CheckpointError, DitAccelError
from dit_accel.features import ExtractorConfig, FeatureExtractor
from dit_accel.quality import caption_satisfied, feature_distance

PIPELINES = Path(__file__).parent.parent / "pipelines"
sys.path.insert(0, str(PIPELINES))

from training import fashion, shapes  # noqa: E402
from training.classifier import blur  # noqa: E402

HEADS = {
    "noun": ("shirt", "dress", "t-shirt"),
    "colour": ("red", "orange"),
    "background": ("white", "gray", "black"),
}


def extractor(frames: bool = False, seed: int = 0, channels: tuple[int, ...] = (4, 6, 8)) -> FeatureExtractor:
    """A small one with random weights; the statistics of its norms are not those of a fresh one."""
    torch.manual_seed(seed)
    model = FeatureExtractor(ExtractorConfig(channels, frames, HEADS))
    shape = (4, 5, 3, 20, 20) if frames else (4, 3, 20, 20)
    model(torch.rand(shape))
    return model.eval().requires_grad_(False)


def items(frames: bool, batch: int = 2, height: int = 32, width: int = 32, length: int = 5) -> torch.Tensor:
    shape = (batch, length, 3, height, width) if frames else (batch, 3, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(height))


# ------------------------------------------------------------------------------------------------- the network itself


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize(("height", "width", "length"), [(16, 16, 3), (17, 33, 4), (32, 32, 5), (45, 16, 9)])
def test_any_size_gives_maps_and_logits(frames: bool, height: int, width: int, length: int) -> None:
    model, x = extractor(frames), items(frames, 2, height, width, length)
    maps = model.features(x)
    halves = [(height, width)]
    for _ in range(2):
        halves.append(((halves[-1][0] + 1) // 2, (halves[-1][1] + 1) // 2))
    leading = (2, length) if frames else (2,)
    assert [tuple(m.shape) for m in maps] == [(*leading, c, h, w) for c, (h, w) in zip((4, 6, 8), halves)]
    assert all(float(m.min()) >= 0 for m in maps)
    assert {name: tuple(logits.shape) for name, logits in model(x).items()} == {
        "noun": (2, 3),
        "colour": (2, 2),
        "background": (2, 3),
    }
    words = model.predict(x)
    assert all(len(found) == 2 and {*found} <= {*HEADS[name]} for name, found in words.items())


@pytest.mark.parametrize("frames", [False, True])
def test_items_of_a_batch_and_their_precision_do_not_matter(frames: bool) -> None:
    model, x = extractor(frames), items(frames, 3)
    for name, logits in model(x).items():
        torch.testing.assert_close(model(x[1:2])[name], logits[1:2])
        torch.testing.assert_close(model(x.double())[name], logits)


def test_videos_are_seen_in_time_and_pictures_of_a_video_are_not_mixed_up() -> None:
    model, x = extractor(frames=True), items(True, 2, length=7)
    backwards = model(x.flip(1))
    assert not torch.allclose(model(x)["noun"], backwards["noun"], atol=1e-4)
    changed = x.clone()
    changed[0, 6] = 0
    maps, others = model.features(x), model.features(changed)
    for stage, (before, after) in enumerate(zip(maps, others), start=1):
        differs = [not torch.equal(before[0, f], after[0, f]) for f in range(7)]
        assert differs == [f >= 6 - stage for f in range(7)]  # each stage sees one frame further
        assert torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("frames", "shape", "message"),
    [
        (False, (1, 3, 15, 32), "15 x 32 pixels; give at least 16"),
        (False, (1, 1, 32, 32), r"\[1, 1, 32, 32\]; give \[B, 3, H, W\]"),
        (False, (1, 5, 3, 32, 32), r"give \[B, 3, H, W\]"),
        (False, (0, 3, 32, 32), r"\[0, 3, 32, 32\]"),
        (True, (1, 3, 32, 32), r"give \[B, F, 3, H, W\]"),
        (True, (1, 2, 3, 32, 32), "2 frames; give at least 3"),
    ],
)
def test_wrong_shapes_are_one_clear_sentence(frames: bool, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DitAccelError, match=message):
        extractor(frames).predict(torch.rand(shape))
    with pytest.raises(DitAccelError, match="uint8"):
        extractor().features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------------------ captions


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red dress on a white background", {"noun": "dress", "colour": "red", "background": "white"}),
        ("a red dress on white background", {"noun": "dress", "colour": "red", "background": "white"}),
        ("red dress on a white background", {"noun": "dress", "colour": "red", "background": "white"}),
        ("A RED T-Shirt, on Gray.", {"noun": "t-shirt", "colour": "red", "background": "gray"}),
        ("an orange shirt", {"noun": "shirt", "colour": "orange"}),
        ("t shirt", {"noun": "t-shirt"}),
        ("dresses, coloured, red-ish, blackboard, _red_", {}),
        ("a dress and a shirt, red", {"colour": "red"}),
        ("a dress, a red dress", {"noun": "dress", "colour": "red"}),
        ("", {}),
    ],
)
def test_captions_are_read_in_whole_words(caption: str, expected: dict[str, str]) -> None:
    assert extractor().expected(caption) == expected


def test_every_caption_of_the_data_is_read_back() -> None:
    images = FeatureExtractor.from_pretrained(PIPELINES / "fashion-classifier")
    videos = FeatureExtractor.from_pretrained(PIPELINES / "shapes-classifier")
    for model, captions in ((images, fashion.CAPTIONS), (videos, shapes.CAPTIONS)):
        read = {tuple(model.expected(caption).items()) for caption in captions}
        assert len(read) == len(captions)
        assert all(len(named) == len(model.config.heads) for named in read)


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("frames", [False, True])
def test_what_was_saved_comes_back_bit_for_bit(frames: bool, tmp_path: Path) -> None:
    model, x = extractor(frames), items(frames)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = FeatureExtractor.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config and not again.training
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(model.features(x), again.features(x)))
    assert all(torch.equal(logits, again(x)[name]) for name, logits in model(x).items())
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    different = extractor(frames, seed=1).state_dict()
    assert any(not torch.equal(tensor, state[name]) for name, tensor in different.items())


CONFIGS: list[tuple[Any, str]] = [
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    (" " * 300_000, "300000 bytes"),
    ([], "give a mapping of channels, format, frames, heads"),
    ({"format": "dit_accel.features/2"}, "features/1"),
    ({"more": 1}, "give a mapping"),
    ({"channels": []}, "channels"),
    ({"channels": [4, 6, 8, 8, 8, 8]}, "1 to 5 whole numbers"),
    ({"channels": [4, 10**9, 8]}, "channels"),
    ({"channels": [4, True, 8]}, "channels"),
    ({"channels": "abc"}, "channels"),
    ({"frames": 0}, "frames is 0; give true"),
    ({"heads": {}}, "heads"),
    ({"heads": {"all": ["red"]}}, "other than 'all'"),
    ({"heads": {"colour": []}}, "words of the head 'colour'"),
    ({"heads": {"colour": ["red", "red"]}}, "different ones"),
    ({"heads": {"colour": ["Red"]}}, "lower case"),
    ({"heads": {"colour": ["(red"]}}, "lower case"),
    ({"heads": {"colour": "red"}}, "words of the head"),
    ({"heads": {"colour": [3]}}, "words of the head"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS, ids=[str(change)[:40] for change, _ in CONFIGS])
def test_bad_configs_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    extractor().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    assert ExtractorConfig.from_dict(good) == extractor().config
    text = change if isinstance(change, str) else json.dumps(good | change if isinstance(change, dict) else change)
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        FeatureExtractor.from_pretrained(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    extractor().save_pretrained(tmp_path)
    good = load_file(path)

    def refused(message: str, **changes: torch.Tensor | None) -> None:
        named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file({name: tensor for name, tensor in (good | named).items() if tensor is not None}, path)
        refused_now(message)

    def refused_now(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            FeatureExtractor.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)

    refused("not finite", head__bias=torch.full_like(good["head.bias"], float("nan")))
    refused("'head.bias' where its config needs", head__bias=torch.zeros(9))
    refused("F16", head__bias=good["head.bias"].half())
    refused("nothing for 'head.bias'", head__bias=None)
    refused("'zzz' where its config needs nothing", zzz=torch.zeros(1))
    refused("bytes; weights of this config have at most", zzz=torch.zeros(100_000))
    path.write_bytes(b"\x80\x04pickle")
    refused_now("not a safetensors file")
    path.write_bytes(b"")
    refused_now("not a safetensors file")
    path.unlink()
    refused_now("There is no file .*model.safetensors")
    (tmp_path / "config.json").unlink()
    refused_now("There is no file .*config.json")
    save_file(good, path)
    extractor().save_pretrained(tmp_path)
    FeatureExtractor.from_pretrained(tmp_path)  # what was refused was refused for its change


# ------------------------------------------------------------------------------------------------ what is shipped knows


@pytest.mark.parametrize("name", ["fashion-classifier", "shapes-classifier"])
def test_shipped_folders_are_small_and_plain(name: str) -> None:
    folder = PIPELINES / name
    files = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
    assert {*files} == {"README.md", "config.json", "model.safetensors", "train.py", "training.json"}
    assert files["model.safetensors"].st_size < 1.2e6
    assert all(status.st_mode & 0o777 == 0o644 for status in files.values())


@pytest.mark.skipif(not fashion.DATASET.exists(), reason="apt-get install dataset-fashion-mnist")
def test_the_fashion_classifier_knows_photos_that_it_has_not_seen() -> None:
    model = FeatureExtractor.from_pretrained(PIPELINES / "fashion-classifier")
    drawn = fashion.Photos("t10k").draw(2000, fashion.step_generator(5, 0))
    pictures, captions = drawn.pictures / 2 + 0.5, [fashion.CAPTIONS[i] for i in drawn.caption.tolist()]
    found = caption_satisfied(pictures, captions, model)
    assert {name: one.count for name, one in found.items()} == dict.fromkeys(found, 2000)
    assert found["noun"].share >= 0.9 and found["all"].share >= 0.9
    assert found["colour"].share >= 0.99 and found["background"].share >= 0.99
    assert caption_satisfied(blur(pictures), captions, model)["noun"].share >= 0.9
    swapped = caption_satisfied(pictures, captions[1:] + captions[:1], model)
    assert swapped["noun"].share < 0.2 and swapped["colour"].share < 0.3 and swapped["all"].share < 0.05


@pytest.mark.parametrize("frames", [5, 9, shapes.FRAMES])
def test_the_shapes_classifier_knows_clips_that_it_has_not_seen(frames: int) -> None:
    model = FeatureExtractor.from_pretrained(PIPELINES / "shapes-classifier")
    drawn = shapes.draw_clips(120, frames, fashion.step_generator(5, frames))
    videos, captions = drawn.videos.transpose(1, 2) / 2 + 0.5, [shapes.CAPTIONS[i] for i in drawn.caption.tolist()]
    found = caption_satisfied(videos, captions, model)
    assert min(one.share for one in found.values()) >= 0.99
    videos, captions = videos[:30], captions[:30]
    backwards = caption_satisfied(videos.flip(1), captions, model)
    assert backwards["direction"].share == 0 and backwards["shape"].share == 1
    still = caption_satisfied(videos[:, :1].expand_as(videos), captions, model)
    assert (
        still["direction"].share < 0.5
    )  # one picture says nothing of a direction, but where a shape stands hints at it


@pytest.mark.parametrize("name", ["fashion-classifier", "shapes-classifier"])
def test_the_shipped_distance_grows_with_noise_and_with_blur(name: str) -> None:
    model = FeatureExtractor.from_pretrained(PIPELINES / name)
    drawn = shapes.draw_clips(4, 5, fashion.step_generator(6, 0))
    videos = drawn.videos.transpose(1, 2) / 2 + 0.5
    x = videos if model.config.frames else videos[:, 0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    noisy = [feature_distance(x, (x + strength * noise).clamp(0, 1), model) for strength in (0, 0.01, 0.03, 0.1, 0.3)]
    assert noisy[0].tolist() == [0.0] * 4
    assert all((weaker < stronger).all() for weaker, stronger in itertools.pairwise(noisy))
    assert (feature_distance(x, blur(x), model) < feature_distance(x, blur(blur(blur(x))), model)).all()
    another = x.roll(1, 0)
    assert (feature_distance(x, another, model) > noisy[2]).all()
