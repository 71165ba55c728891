"""Training of the shipped classifiers: seeded, resumable, and what disturbs a picture leaves what its caption says."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PIPELINES = Path(__file__).parents[2] / "pipelines"
sys.path.insert(0, str(PIPELINES))

from training import classifier, fashion, shapes  # noqa: E402

from dit_accel.features import ExtractorConfig, FeatureExtractor  # noqa: E402


def script(name: str) -> ModuleType:
    """The training script of a shipped classifier, as a module."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), PIPELINES / name / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def small_task(name: str, config: classifier.ClassifierConfig) -> classifier.Task:
    module = script(name)
    task = module.ShapesTask(config) if name == "shapes-classifier" else module.FashionTask(config)
    task.extractor = ExtractorConfig((4, 6), task.extractor.frames, task.extractor.heads)
    return task


needs_photos = pytest.mark.skipif(not fashion.DATASET.exists(), reason="apt-get install dataset-fashion-mnist")
NAMES = ["shapes-classifier", pytest.param("fashion-classifier", marks=needs_photos)]


@pytest.mark.parametrize("name", NAMES)
def test_resumed_training_is_that_of_one_go(name: str, tmp_path: Path) -> None:
    config = classifier.ClassifierConfig(steps=4, batch=4)

    def weights(folder: str, stops: list[int], config: classifier.ClassifierConfig = config) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir()
        found = {}
        for stop in stops:
            trainer = classifier.ClassifierTrainer(small_task(name, config), config, tmp_path / folder)
            trainer.resume()
            while trainer.step < stop:
                trainer.train_step()
            trainer.save()
            both = {"model": trainer.model, "average": trainer.average}
            found = {f"{which}.{n}": t for which, model in both.items() for n, t in model.state_dict().items()}
        return found

    whole, parts = weights("whole", [4]), weights("parts", [1, 3, 4])
    assert all(torch.equal(tensor, parts[n]) for n, tensor in whole.items())
    other = weights("other", [4], classifier.ClassifierConfig(seed=1, steps=4, batch=4))
    assert not torch.equal(whole["average.head.weight"], other["average.head.weight"])
    changed = classifier.ClassifierConfig(steps=4, batch=4, rate=1e-3)
    with pytest.raises(SystemExit, match="another --work folder"):
        classifier.ClassifierTrainer(small_task(name, changed), changed, tmp_path / "whole").resume()


def test_training_learns_and_publishes_what_can_be_loaded(tmp_path: Path) -> None:
    config = classifier.ClassifierConfig(steps=30, batch=8, rate=2e-2, noise=0.02)
    task = small_task("shapes-classifier", config)
    task.accuracies = lambda model: {"frames": model.config.frames}
    trainer = classifier.ClassifierTrainer(task, config, tmp_path)
    trainer.run(save_every=20)
    assert (tmp_path / "checkpoint.safetensors").exists()
    trainer.publish(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["steps"] == 30 and record["accuracies"] == {"frames": True} and record["cpu_seconds"] >= 0
    model = FeatureExtractor.from_pretrained(tmp_path / "out")
    assert torch.equal(model.head.weight, trainer.average.head.weight)
    clips = shapes.draw_clips(60, 5, fashion.step_generator(9, 0))
    videos, targets = clips.videos.transpose(1, 2) / 2 + 0.5, {"background": clips.background}
    assert classifier.shares_right(model, videos, targets)["background"] > 0.6  # by chance 0.33


def test_the_rate_rises_straight_and_falls_to_zero() -> None:
    config = classifier.ClassifierConfig(steps=100, warmup_fraction=0.2)
    rates = [classifier.rate_factor(step, config) for step in range(101)]
    assert rates[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert rates[20] == 1.0 and rates[60] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))


def test_disturbed_pictures_stay_pictures_of_the_same() -> None:
    white_gray_black = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    clean = white_gray_black.repeat(50, 1, 1, 1)
    disturbed = classifier.disturb(clean, 0.05, fashion.step_generator(0, 0))
    assert float(disturbed.min()) >= 0 and float(disturbed.max()) <= 1
    level = disturbed.mean((1, 2, 3))
    assert ((level - clean[:, 0, 0, 0]).abs() < 0.2).all()  # less than half of the 0.5 between two backgrounds
    assert level[1::3].unique().numel() == 50  # each in its own way


def test_blur_by_hand() -> None:
    dot = torch.zeros(1, 2, 3, 3)
    dot[0, 1, 1, 1] = 16
    assert classifier.blur(dot)[0].tolist() == [[[0.0] * 3] * 3, [[1, 2, 1], [2, 4, 2], [1, 2, 1]]]
    assert torch.equal(classifier.blur(torch.full((1, 3, 5, 4), 0.5)), torch.full((1, 3, 5, 4), 0.5))


def test_moved_pictures_keep_their_place_within_a_pixel() -> None:
    dot = torch.zeros(64, 1, 32, 32)
    dot[:, :, 15:17, 15:17] = 1.0
    moved = classifier.move(dot, fashion.step_generator(0, 1))
    axis = torch.arange(32) + 0.5
    across, down = ((moved[:, 0].sum(d) * axis).sum(1) / moved[:, 0].sum((1, 2)) - 16 for d in (1, 2))
    for shift in (across, down):
        assert 0.7 < float(shift.abs().max()) <= 1.1 and float(shift.std()) > 0.4
    half = torch.zeros(64, 1, 32, 32)
    half[..., 16:] = 1.0
    left = classifier.move(half, fashion.step_generator(0, 2))[:, 0, 16, 2] > 0.5
    assert 16 < int(left.sum()) < 48  # mirrored by chance


def test_another_speed_shows_the_same_motion() -> None:
    module = script("shapes-classifier")
    time = torch.arange(17.0).view(1, 17, 1, 1, 1).expand(100, 17, 3, 2, 2)
    for frames in (5, 9, 17):
        played = module.at_another_speed(time, frames, fashion.step_generator(0, frames))
        assert played.shape == (100, frames, 3, 2, 2)
        steps = played.diff(dim=1)
        torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), atol=1e-4, rtol=0)
        speeds = steps[:, 0, 0, 0, 0]
        assert float(speeds.min()) >= 0.5 - 1e-4 and float(speeds.max()) <= min(2, 16 / (frames - 1)) + 1e-4
        assert float(speeds.max() - speeds.min()) > 0.4
        assert float(played.min()) >= 0 and float(played.max()) <= 16
