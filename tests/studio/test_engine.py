"""The engine: numbers of `dit-accel compare`, exact files, a cancel within a step, and nothing left behind."""

import json
import os
import random
import re
import runpy
import shlex
import subprocess
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel import BlockCache, BlockSparse, Forecast, Policy, VectorQuant
from dit_accel.cli import main
from dit_accel.compare import compare
from dit_accel.denoiser.subclass import owner_of
from dit_accel.errors import ArgumentError, DitAccelError
from dit_accel.render.stop import Stop
from dit_accel.studio.batch import render_list
from dit_accel.studio.export import command, linked, policy_json, python_lines, query
from dit_accel.studio.followed import ACCELERATED, PLAIN, Progress
from dit_accel.studio.prompt_list import rows_of
from dit_accel.studio.studio import Studio
from dit_accel.studio.visit import Visit
from dit_accel.studio.wanted import wanted
from dit_accel.studio.watch import Cancelled
from dit_accel.video import rgb

from .conftest import FLUX, PROMPT, SKIPPING, WAN, ask, outcome_of, plain_pictures

OWN = Policy(BlockCache(threshold=None, max_skips=2, warmup=2, tail=1), Forecast("newton", order=1))
SPARSE = Policy(attention=BlockSparse(0.25, rest="mean", block_size=16, min_tokens=0), weights=VectorQuant(bits=4))


@pytest.mark.parametrize(
    ("pipeline", "policy", "guidance", "steps"),
    [
        ("tiny-flux", SKIPPING, 1.0, 4),
        ("tiny-flux", OWN, 3.0, 4),
        ("tiny-flux", SPARSE, 1.0, 4),
        ("tiny-flux", "cem", 1.0, 5),  # measures in a first run
        ("tiny-wan", OWN, 1.0, 4),
    ],
)
def test_numbers_are_those_of_compare(studio: Studio, pipeline: str, policy: Any, guidance: float, steps: int) -> None:
    given = policy if isinstance(policy, str) else policy.to_dict()
    prompt = studio.model(pipeline).prompts[1]
    request = ask(studio, pipeline, policy=given, prompt=prompt, guidance=guidance, steps=steps)
    made, model = outcome_of(studio.engine, request), studio.model(pipeline)
    assert made.way.flops_share < 1
    result = compare(
        model.pipe, policy, [prompt], [3], request.steps, request.arguments, progress=False, classifier=model.classifier
    )
    item, way, theirs = result.items[0], made.way, result.items[0].accelerated
    assert (way.psnr, way.ssim, way.flops_share, way.compute_share) == (
        theirs.psnr,
        theirs.ssim,
        theirs.flops_share,
        theirs.compute_share,
    )
    assert (way.relative_l2, way.motion, way.satisfied) == (theirs.relative_l2, theirs.motion, theirs.satisfied)
    assert (made.satisfied, made.state_bytes) == (item.plain_satisfied, result.state_bytes)
    assert [(r.step, r.decision, r.blocks) for r in made.records] == [
        (r.step, r.decision, r.blocks) for r in result.strip
    ]
    numbers = json.loads(json.dumps(made.numbers(), allow_nan=False))
    row = result.to_dict()["items"][0]["accelerated"]
    assert {name: numbers[name] for name in ("psnr", "ssim", "flops_share", "compute_share", "relative_l2")} == {
        name: row[name] for name in ("psnr", "ssim", "flops_share", "compute_share", "relative_l2")
    }


def test_both_pictures_are_those_of_the_pipeline_alone(studio: Studio) -> None:
    request, model = ask(studio), studio.model("tiny-flux")
    made = outcome_of(studio.engine, request)
    assert torch.equal(made.plain.pictures, plain_pictures(model.pipe, request))
    assert owner_of(model.pipe) is None and not torch.equal(made.plain.pictures, made.made.pictures)


def test_the_plain_run_is_made_once(studio: Studio) -> None:
    request = ask(studio, seed=11)
    assert not outcome_of(studio.engine, request).plain_kept
    again = outcome_of(studio.engine, replace(request, policy=Policy.named("quality"), policy_name="quality"))
    assert again.plain_kept and again.made.seconds > 0
    assert not outcome_of(studio.engine, ask(studio, seed=12)).plain_kept


def test_every_step_is_told_with_a_look_at_the_picture(studio: Studio) -> None:
    told = [event for event in studio.engine.compare(ask(studio, seed=21), Stop()) if isinstance(event, Progress)]
    phases = [event.phase for event in told]
    assert phases.index(PLAIN) < phases.index(ACCELERATED)
    accelerated = [event for event in told if event.phase == ACCELERATED]
    assert accelerated[-1].step == 7 and len(accelerated[-1].records) == 7
    looks = [event.preview for event in told if event.preview is not None]
    assert looks and all(look.shape == (3, 32, 32) and look.min() >= 0 and look.max() <= 1 for look in looks)


def test_what_cannot_be_made_is_refused_before_any_work(studio: Studio) -> None:
    sparse = {"attention": {"impl": "triton", "min_tokens": 0, "block_size": 16}}
    with pytest.raises(DitAccelError, match="impl"):
        outcome_of(studio.engine, ask(studio, policy=sparse))
    assert owner_of(studio.model("tiny-flux").pipe) is None
    outcome_of(studio.engine, ask(studio))


def test_masks_and_errors_of_weights_are_kept(studio: Studio) -> None:
    made = outcome_of(studio.engine, ask(studio, policy=SPARSE.to_dict()))
    assert len(made.masks) == 14 and all(mask.dtype == torch.bool and mask.ndim == 3 for mask in made.masks.values())
    assert 0.2 < float(next(iter(made.masks.values())).float().mean()) < 0.6
    assert len(made.weight_errors) > 50 and all(0 < error < 0.1 for error in made.weight_errors.values())
    assert made.bits is not None and 4 <= made.bits < 5 and made.times_smaller is not None and made.times_smaller > 4


# ------------------------------------------------------------------------------------------------------------- cancel


def test_cancel_ends_a_run_within_a_step_and_leaves_nothing(studio: Studio) -> None:
    long = ask(studio, steps=60, policy="exact")
    check = outcome_of(studio.engine, ask(studio))
    step = check.plain.seconds / 7
    waits = random.Random(0)
    kept = 0
    for _ in range(20):
        stop, delay = Stop(), waits.uniform(0, 0.6)
        asked: list[float] = []

        def press(stop: Stop = stop, asked: list[float] = asked) -> None:
            asked.append(time.monotonic())
            stop.ask()

        timer = threading.Timer(delay, press)
        timer.start()
        with pytest.raises(Cancelled):
            outcome_of_stopped(studio, long, stop)
        timer.join()
        assert time.monotonic() - asked[0] <= step + 1, "within one step and a second"
        kept += owner_of(studio.model("tiny-flux").pipe) is not None
        again = outcome_of(studio.engine, ask(studio))
        assert torch.equal(again.made.pictures, check.made.pictures), "the next run is that of a fresh one"
    assert not kept
    assert torch.equal(plain_pictures(studio.model("tiny-flux").pipe, ask(studio)), check.plain.pictures)


def outcome_of_stopped(studio: Studio, request: Any, stop: Stop) -> None:
    for _ in studio.engine.compare(request, stop):
        pass


def test_cancel_reaches_skipped_steps_and_runs_that_wait(studio: Studio) -> None:
    request, stop = ask(studio, steps=60), Stop()
    with pytest.raises(Cancelled):
        for event in studio.engine.compare(replace(request, steps=7), stop):
            if isinstance(event, Progress) and event.phase == ACCELERATED and event.records:
                stop.ask()
    stopped = Stop()
    stopped.ask()
    with pytest.raises(Cancelled):
        outcome_of_stopped(studio, request, stopped)


# -------------------------------------------------------------------------------------------------------------- files


def save(studio: Studio, request: Any) -> Any:
    visit = Visit()
    own = {"policy": request.policy_name or request.policy.to_dict()}
    asked = {"prompt": request.prompt, "seed": request.seed, "steps": request.steps} | own
    *_, last = studio.compare(visit, request.pipeline, guidance=1.0, **asked)
    return last


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_files_decode_to_the_tensors_and_say_what_they_are(studio: Studio) -> None:
    made, files, _ = save(studio, ask(studio))
    assert np.array_equal(pixels(files.plain), rgb(made.plain.pictures[0]))
    assert np.array_equal(pixels(files.made), rgb(made.made.pictures[0]))
    said = json.loads(Image.open(files.made).text["dit_accel"])
    assert said["arguments"]["prompt"] == PROMPT and said["seed"] == 3 and said["policy"] == SKIPPING
    assert Policy.load(files.downloads[-1]) == Policy.named(SKIPPING)
    assert all(path.is_relative_to(studio.output.root) for path in files.downloads)


def test_videos_come_with_every_frame(studio: Studio) -> None:
    made, files, _ = save(studio, ask(studio, "tiny-wan", prompt=studio.model("tiny-wan").prompts[0]))
    archives = [path for path in files.downloads if path.suffix == ".zip"]
    assert [path.name for path in archives] == ["plain-frames.zip", "accelerated-frames.zip"]
    with zipfile.ZipFile(archives[1]) as archive:
        frames = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
    assert len(frames) == 13
    assert all(np.array_equal(a, rgb(b)) for a, b in zip(frames, made.made.pictures[0]))


@pytest.mark.parametrize("policy", [SKIPPING, OWN.to_dict()], ids=["named", "own"])
def test_what_is_exported_makes_the_same_picture(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Any
) -> None:
    monkeypatch.chdir(tmp_path)  # so that paths are whole ones
    made, files, model = save(studio, ask(studio, policy=policy, prompt='it\'s a "red" boot $(HOME)'))
    (tmp_path / "policy.json").write_text(policy_json(made.wanted.policy))
    lines = python_lines(made.wanted, model) + "picture.save('picture.png')\n"
    render = command(made.wanted, model).split("\n\n")[0]
    (tmp_path / "again.py").write_text(lines)
    runpy.run_path(str(tmp_path / "again.py"))
    first, second = render.splitlines()
    subprocess.run(first, shell=True, cwd=tmp_path, check=True)  # writes the job with the shell's own quoting
    assert main(shlex.split(second)[1:]) == 0
    assert np.array_equal(pixels(tmp_path / "picture.png"), pixels(files.made))
    rendered = tmp_path / "rendered" / "picture.png"
    assert np.array_equal(pixels(rendered), pixels(files.made))
    if isinstance(policy, str):
        assert rendered.read_bytes() == files.made.read_bytes()


def test_a_pipeline_that_is_told_a_class(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = studio.model("tiny-dit")
    assert model.takes_class and model.size is None
    made, files, _ = save(studio, ask(studio, "tiny-dit", prompt=model.prompts[2], steps=4))
    assert made.way.flops_share < 1 and "height" not in made.wanted.arguments
    (tmp_path / "again.py").write_text(python_lines(made.wanted, model) + "picture.save('picture.png')\n")
    runpy.run_path(str(tmp_path / "again.py"))
    assert np.array_equal(pixels(tmp_path / "picture.png"), pixels(files.made))
    with pytest.raises(ArgumentError, match="knows no class"):
        save(studio, ask(studio, "tiny-dit", prompt="a unicorn", steps=4))
    with pytest.raises(ArgumentError, match="one size"):
        ask(studio, "tiny-dit", height=32)


def test_a_link_brings_the_settings_back(studio: Studio) -> None:
    from urllib.parse import parse_qsl

    for policy in ("fast", OWN.to_dict()):
        request, model = ask(studio, policy=policy, prompt="50% & <more>?"), studio.model("tiny-flux")
        asked = linked(dict(parse_qsl(query(request, model))))
        assert asked.pop("pipeline") == "tiny-flux"
        assert wanted(model, studio.limits, **asked) == request
    assert len(query(ask(studio, policy=OWN.to_dict()), studio.model("tiny-flux"))) < 700
    with pytest.raises(ArgumentError, match="steps is 'x'"):
        wanted(studio.model("tiny-flux"), studio.limits, **{"prompt": "", "seed": 0, **linked({"steps": "x"})})


def test_old_runs_make_room(tmp_path: Path) -> None:
    from dit_accel.studio.output import Output

    output = Output(tmp_path, most=3)
    folders = [output.new_queue() for _ in range(5)]
    for number, folder in enumerate(folders):
        if folder.exists():
            os.utime(folder, (number, number))
    output.new_queue()
    assert len(list((tmp_path / "queues").iterdir())) == 3 and not folders[0].exists()
    assert all(re.fullmatch(r"[0-9a-f]{24}", folder.name) for folder in folders), "names that nobody can guess"


# --------------------------------------------------------------------------------------------------------------- lists


def test_a_list_is_rendered_as_the_command_does(studio: Studio) -> None:
    model = studio.model("tiny-flux")
    rows = rows_of("a red boot\na blue coat\n", "", model, studio.limits, 7, SKIPPING)
    *_, last = render_list(studio.engine, model, rows, studio.output.new_queue(), Stop())
    assert (last.total, last.done, last.failed, last.cancelled) == (2, 2, 0, False)
    request = ask(studio, prompt="a blue coat", seed=1, guidance=3.0)
    assert np.array_equal(pixels(last.pictures[1][0]), rgb(outcome_of(studio.engine, request).made.pictures[0]))
    with zipfile.ZipFile(last.archive) as archive:
        assert len(archive.namelist()) == 4


def test_a_cancelled_list_keeps_what_is_finished(studio: Studio) -> None:
    model, stop = studio.model("tiny-flux"), Stop()
    rows = rows_of("a red boot\na blue coat\na green bag\n", "", model, studio.limits, 7, "exact")
    states = []
    for state in render_list(studio.engine, model, rows, studio.output.new_queue(), stop):
        states.append(state)
        if state.done and not stop.asked:
            stop.ask()
    last = states[-1]
    assert last.cancelled and 1 <= last.done < 3
    assert len(last.pictures) == last.done and last.archive is not None
    assert owner_of(model.pipe) is None


def test_two_pipelines_of_one_name_are_told_apart(tmp_path: Path) -> None:
    from dit_accel.studio.catalogue import Catalogue

    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "tiny-flux").symlink_to(FLUX)
    (tmp_path / "copies" / "tiny-flux").mkdir(parents=True)
    (tmp_path / "copies" / "tiny-flux" / "model_index.json").write_text("{}")
    assert Catalogue([FLUX, WAN, tmp_path / "others"]).names == ["tiny-flux", "tiny-wan"]
    assert Catalogue([FLUX, tmp_path / "copies"]).names == ["tiny-flux", "copies/tiny-flux"]
    with pytest.raises(ArgumentError, match="no pipeline"):
        Catalogue([tmp_path / "copies" / "tiny-flux" / "x"])
