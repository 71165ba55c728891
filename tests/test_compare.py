"""compare: its numbers against calls made by hand, on tiny random pipelines; the claim, on the shipped trained one."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dit_accel
from dit_accel import BlockCache, Forecast, Policy
from dit_accel.compare import compare
from dit_accel.comparison import write_report
from dit_accel.denoiser.flops import FlopMeter
from dit_accel.denoiser.subclass import owner_of
from dit_accel.errors import ArgumentError, NonFiniteError, PolicyError
from dit_accel.features import FeatureExtractor
from dit_accel.quality import QualityError, feature_distance, psnr, relative_l2, ssim
from dit_accel.testing import tiny_pipelines
from dit_accel.video import flicker, read_mp4, temporal_psnr

POLICY = Policy(BlockCache(threshold=None, max_skips=2, warmup=2, tail=1), Forecast("newton", order=1))
STEPS = 8
SHIPPED = Path(__file__).parents[1] / "pipelines" / "tiny-flux"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(name: str = "flux") -> tuple[Any, dict[str, Any]]:
    built = tiny_pipelines.build(name, 6)
    return built.pipe, {key: value for key, value in built.arguments.items() if key != "output_type"}


def images_by_hand(
    pipe: Any, arguments: dict[str, Any], seed: int, steps: int, output_type: str = "pt"
) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        return pipe(**arguments, generator=generator, num_inference_steps=steps, output_type=output_type)[0]


def test_numbers_are_those_of_calls_made_by_hand() -> None:
    pipe, arguments = tiny()
    result = compare(pipe, POLICY, [None], [3, 4], STEPS, arguments, progress=False)
    memory = 0
    for item in result.items:
        plain, latents = (images_by_hand(pipe, arguments, item.seed, STEPS, kind) for kind in ("pt", "latent"))
        with dit_accel.apply(pipe, POLICY) as session:
            fast, fast_latents = (images_by_hand(pipe, arguments, item.seed, STEPS, kind) for kind in ("pt", "latent"))
        memory = max(memory, session.stats.state_bytes)
        assert item.accelerated.psnr == float(psnr(fast, plain))
        assert item.accelerated.relative_l2 == pytest.approx(float(relative_l2(fast_latents, latents)), rel=1e-6)
        assert item.accelerated.flops_share == session.stats.flops_share < 0.7
        assert item.accelerated.compute_share == session.stats.compute_share < 0.7
        assert item.fewer.steps == round(STEPS * session.stats.flops_share)
        fewer = images_by_hand(pipe, arguments, item.seed, item.fewer.steps)
        assert item.fewer.psnr == float(psnr(fewer, plain))
        assert item.accelerated.seconds > 0 and item.fewer.seconds > 0 and item.plain_seconds > 0
    levels = [item.accelerated.psnr for item in result.items]
    assert result.accelerated.psnr.mean == pytest.approx(sum(levels) / 2) and result.accelerated.psnr.worst == min(
        levels
    )
    assert result.worst.seed == result.items[levels.index(min(levels))].seed
    assert result.state_bytes == memory > 0
    assert result.policy == POLICY.to_dict() and result.threads == 1 and set(result.versions) >= {"torch", "diffusers"}
    assert [record.step for record in result.strip] == list(range(STEPS)) and result.strip[0].run != 0


@pytest.mark.parametrize("name", ["wan", "wan22", "wan_i2v"])
def test_video_is_compared_frame_by_frame_and_in_time(name: str) -> None:
    pipe, arguments = tiny(name)
    result = compare(pipe, POLICY, [None], [0, 1], STEPS, arguments, progress=False)
    for item in result.items:
        plain = images_by_hand(pipe, arguments, item.seed, STEPS)
        with dit_accel.apply(pipe, POLICY) as session:
            fast = images_by_hand(pipe, arguments, item.seed, STEPS)
        denoisers = {step.denoiser for step in session.stats.steps if step.blocks_run < step.blocks_total}
        assert denoisers == {*session.denoisers}, "every denoiser skips blocks"
        assert len(session.denoisers) == (2 if name == "wan22" else 1)
        assert item.accelerated.flops_share == session.stats.flops_share < 0.8
        fewer = images_by_hand(pipe, arguments, item.seed, item.fewer.steps)
        assert plain.ndim == 5 and plain.shape[1] == 9
        for way, video in ((item.accelerated, fast), (item.fewer, fewer)):
            frames = psnr(video[0], plain[0])
            assert way.psnr == pytest.approx(float(frames.mean()), rel=1e-6)
            assert way.ssim == pytest.approx(float(ssim(video[0], plain[0]).mean()), rel=1e-6)
            assert way.motion is not None and way.motion.worst_frame_psnr == pytest.approx(float(frames.min()))
            assert way.motion.temporal_psnr == pytest.approx(float(temporal_psnr(video, plain)), rel=1e-6)
            assert way.motion.flicker == pytest.approx(float(flicker(video, plain)), rel=1e-6)
        shown = result.pictures[item.seed]
        assert shown.psnr == pytest.approx(item.accelerated.motion.worst_frame_psnr)
        assert shown.plain.shape == (1, *plain.shape[2:])
        if item == result.worst:
            assert result.clip is not None and result.clip.seed == item.seed
            assert torch.equal(result.clip.plain, plain[0]) and torch.equal(result.clip.accelerated, fast[0])
            assert torch.equal(result.clip.fewer, fewer[0])
    summary = result.accelerated.motion
    motions = [item.accelerated.motion for item in result.items]
    assert summary is not None and summary.flicker.worst == max(motion.flicker for motion in motions)
    assert summary.temporal_psnr.worst == min(motion.temporal_psnr for motion in motions)
    assert summary.worst_frame_psnr.mean == pytest.approx(sum(m.worst_frame_psnr for m in motions) / 2)


def test_report_of_a_video(tmp_path: Path) -> None:
    pipe, arguments = tiny("wan")
    result = compare(pipe, POLICY, [None], [0, 1], STEPS, arguments, progress=False)
    paths = write_report(result, tmp_path, fps=12)
    pictures = ["grid.png", "sheet.png", "strip.png"]
    clips = ["accelerated.mp4", "fewer.mp4", "plain.mp4", "side-by-side.mp4"]
    assert sorted(path.name for path in paths) == sorted(["comparison.json", "table.txt", *pictures, *clips])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    with Image.open(tmp_path / "sheet.png") as sheet:
        sheet.load()
    count, _, height, width = result.clip.plain.shape
    assert sheet.width > count * width and sheet.height > 4 * height
    frames, fps = read_mp4(tmp_path / "accelerated.mp4")
    assert fps == 12 and frames.shape == (count, 3, height, width)
    assert float((frames - result.clip.accelerated).abs().mean()) < 0.05
    beside, fps = read_mp4(tmp_path / "side-by-side.mp4")
    assert fps == 12 and beside.shape == (count, 3, height, 3 * width + 8)
    assert float((beside[..., -width:] - result.clip.fewer).abs().mean()) < 0.05
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["items"][0]["fewer"]["motion"].keys() == {"worst_frame_psnr", "temporal_psnr", "flicker"}
    assert data["accelerated"]["motion"]["flicker"]["worst"] == result.accelerated.motion.flicker.worst
    lines = result.table().splitlines()
    head = next(line for line in lines if line.startswith("video"))
    rows = lines[lines.index(head) + 1 :][:2]
    assert [row.split("  ")[0].strip() for row in rows] == ["accelerated", "fewer steps"]
    assert f"{result.fewer.motion.temporal_psnr.worst:.2f}" in rows[1] and len({map(len, [head, *rows])}) == 1


def test_a_video_of_one_frame_has_no_measures_in_time(tmp_path: Path) -> None:
    pipe, arguments = tiny("wan")
    result = compare(pipe, POLICY, [None], [0], STEPS, arguments | {"num_frames": 1}, progress=False)
    motion = result.items[0].accelerated.motion
    assert motion is not None and motion.temporal_psnr is None and motion.flicker is None
    assert motion.worst_frame_psnr == result.items[0].accelerated.psnr
    assert result.accelerated.motion.temporal_psnr is None and "-  " in result.table()
    assert len(write_report(result, tmp_path)) == 9


def test_images_say_nothing_of_motion() -> None:
    pipe, arguments = tiny("sd3")  # both guidance branches in one batch
    result = compare(pipe, POLICY, [None], [0], STEPS, arguments, progress=False)
    assert result.clip is None and "temporal" not in result.table() and "motion" not in result.to_json()
    assert result.accelerated.flops_share < 0.7 and result.accelerated.relative_l2 is not None
    assert {step.branch for step in result.strip} == {"call 0"}


def test_class_names_are_prompts() -> None:
    pipe, _ = tiny("dit")
    pipe.labels = {"dress": 3, "boot": 5}
    result = compare(pipe, POLICY, ["boot", "3"], [0], STEPS, {"guidance_scale": 2.0}, progress=False)
    assert [item.prompt for item in result.items] == ["boot", "3"]
    plain = images_by_hand(pipe, {"class_labels": [5], "guidance_scale": 2.0}, 0, STEPS)
    assert torch.equal(result.pictures[0].plain, plain)
    with pytest.raises(ArgumentError, match="did you mean 'dress'"):
        compare(pipe, POLICY, ["boot", "dres"], [0], STEPS, progress=False)


@pytest.mark.parametrize("name", ["dit", "flux_modular"])
def test_pipelines_of_other_kinds(name: str) -> None:
    pipe, arguments = tiny(name)
    result = compare(pipe, POLICY, [None], [0], STEPS, arguments, progress=False)
    assert 10 < result.accelerated.psnr.mean < 120 and result.accelerated.flops_share < 0.7
    assert result.accelerated.relative_l2 is None  # these do not show their latents


def test_arrays_where_a_pipeline_gives_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = tiny()
    expected = compare(pipe, POLICY, [None], [0], STEPS, arguments, progress=False)
    plain = pipe.image_processor.postprocess

    def arrays_only(image: Any, output_type: str) -> Any:
        if output_type == "pt":
            raise ValueError("no tensors here")
        return plain(image, output_type=output_type)

    monkeypatch.setattr(pipe.image_processor, "postprocess", arrays_only)
    result = compare(pipe, POLICY, [None], [0], STEPS, arguments, progress=False)
    assert result.items[0].accelerated.psnr == expected.items[0].accelerated.psnr
    assert torch.equal(result.pictures[0].plain, expected.pictures[0].plain)


def test_exact_policy_is_identical_and_says_so(tmp_path: Path) -> None:
    pipe, arguments = tiny()
    result = compare(pipe, "exact", [None], [0, 1], STEPS, arguments, progress=False)
    assert [item.accelerated.psnr for item in result.items] == [math.inf] * 2
    assert result.accelerated.psnr.identical == 2 and result.accelerated.flops_share == 1.0
    assert [item.fewer.steps for item in result.items] == [STEPS] * 2 and result.accelerated.relative_l2 is not None
    assert result.accelerated.relative_l2.mean == 0.0
    data = json.loads(result.to_json())
    assert data["items"][0]["accelerated"]["psnr"] is None and data["items"][0]["accelerated"]["identical"] is True
    assert "2 of 2 items are identical" in result.table() and "Nothing was skipped" in result.report
    assert len(write_report(result, tmp_path)) == 4


def test_calls_are_interleaved_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = tiny()
    order: list[str] = []
    check, names = pipe.check_inputs, {True: "accelerated", False: "plain"}

    def check_inputs(*args: Any, **kwargs: Any) -> None:
        order.append(names[owner_of(pipe) is not None])
        check(*args, **kwargs)

    monkeypatch.setattr(pipe, "check_inputs", check_inputs)
    compare(pipe, POLICY, [None], [0, 1], STEPS, arguments, repeats=2, progress=False)
    assert order == ["accelerated", "plain", "plain"] + ["plain", "accelerated", "plain"] * 4


def test_flops_are_counted_once_and_the_pipe_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = tiny()
    kind, before, rng = type(pipe), images_by_hand(pipe, arguments, 0, STEPS), torch.get_rng_state()
    known: list[bool] = []
    plain = FlopMeter.measuring

    def measuring(meter: FlopMeter, key: Any) -> Any:
        known.append(key in meter.tables)
        return plain(meter, key)

    monkeypatch.setattr(FlopMeter, "measuring", measuring)
    compare(pipe, POLICY, [None], [0, 1], STEPS, arguments, progress=False)
    assert known == [False, True, True]  # counting is slow: only the warm-up may do it, not the calls that are timed
    assert type(pipe) is kind and owner_of(pipe.transformer) is None and torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(images_by_hand(pipe, arguments, 0, STEPS), before)


def test_an_item_that_fails_is_listed_and_the_others_go_on() -> None:
    pipe, arguments = tiny()

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        del module, inputs
        return tuple(value * float("nan") for value in output) if torch.initial_seed() == 1 else output

    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(spoil)
    result = compare(pipe, "fbcache", [None], [0, 1, 2], STEPS, arguments, progress=False)
    assert [item.seed for item in result.items] == [0, 2]
    assert [failure.seed for failure in result.failures] == [1] and "NaN" in result.failures[0].error
    assert "Failed: seed 1" in result.table() and json.loads(result.to_json())["failures"][0]["seed"] == 1
    with pytest.raises(NonFiniteError):
        compare(pipe, "fbcache", [None], [1], STEPS, arguments, progress=False)
    hook.remove()
    assert owner_of(pipe) is None and owner_of(pipe.transformer) is None


def test_a_pipe_that_belongs_to_a_session_is_refused() -> None:
    pipe, arguments = tiny()
    with dit_accel.apply(pipe, POLICY) as session:
        with pytest.raises(PolicyError, match="already belongs to a session"):
            compare(pipe, POLICY, [None], [0], STEPS, arguments)
        assert owner_of(pipe) is session
    with (
        dit_accel.apply(pipe.transformer, POLICY),
        pytest.raises(PolicyError, match="already belongs to a session"),
    ):
        compare(pipe, POLICY, [None], [0], STEPS, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"seeds": []}, "no seeds"),
        ({"seeds": ["a"]}, "integers"),
        ({"steps": 0}, "steps=0"),
        ({"repeats": 1.5}, r"repeats=1\.5"),
        ({"arguments": {"generator": None}}, "set by `seeds`"),
        ({"arguments": {"guidance": 3}}, "'guidance_scale'"),
        ({"arguments": {}}, "refused the call: .*prompt"),
        ({"pipe": torch.nn.Linear(1, 1)}, "give a diffusers pipeline"),
    ],
)
def test_wrong_arguments_are_one_sentence(change: dict[str, Any], message: str) -> None:
    pipe, arguments = tiny()
    given: dict[str, Any] = {"pipe": pipe, "prompts": [None], "seeds": [0], "steps": STEPS, "arguments": arguments}
    with pytest.raises(ArgumentError, match=message):
        compare(policy=POLICY, progress=False, **(given | change))
    assert owner_of(pipe) is None


def test_too_few_steps_for_the_policy_fail_before_the_plain_run() -> None:
    pipe, arguments = tiny()
    with pytest.raises(PolicyError, match="too few"):
        compare(pipe, POLICY, [None], [0], 3, arguments, progress=False)
    assert owner_of(pipe) is None


def test_report_folder_and_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.compare.KEPT", 2)
    pipe, arguments = tiny()
    result = compare(pipe, POLICY, [None], [0, 1, 2, 3, 4], STEPS, arguments, progress=False)
    assert [picture.seed for picture in result.pictures] in ([0, 1], [0, result.worst.seed])
    assert result.worst.seed in [picture.seed for picture in result.pictures]
    paths = write_report(result, tmp_path / "new" / "folder")
    names = ["comparison.json", "grid.png", "strip.png", "table.txt"]
    assert (
        sorted(path.name for path in paths) == names == sorted(p.name for p in (tmp_path / "new" / "folder").iterdir())
    )
    data = json.loads(paths[0].read_text())
    assert (
        data == result.to_dict() and len(data["items"]) == 5 and data["arguments"]["prompt_embeds"].startswith("tensor")
    )
    assert Policy.from_dict(data["policy"]) == POLICY
    lines = paths[1].read_text().splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["plain", "accelerated", "fewer steps"]
    assert f"Worst accelerated: seed {result.worst.seed}." in lines
    for path in paths[2:]:
        with Image.open(path) as picture:
            picture.verify()
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="cannot be made"):
        write_report(result, tmp_path / "file")


@pytest.mark.skipif(not (SHIPPED / "model_index.json").exists(), reason="the trained pipeline is not here yet")
def test_pairs_are_one_seed_a_prompt() -> None:
    pipe, arguments = tiny("dit")
    arguments.pop("class_labels", None)
    result = compare(pipe, POLICY, ["3", "4"], [7, 8], STEPS, arguments, progress=False, paired=True)
    assert [(item.prompt, item.seed) for item in result.items] == [("3", 7), ("4", 8)]
    with pytest.raises(ArgumentError, match="2 prompts and 3 seeds in pairs"):
        compare(pipe, POLICY, ["3", "4"], [7, 8, 9], STEPS, arguments, progress=False, paired=True)


def test_classifier_says_what_it_sees_and_how_far_it_is() -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(SHIPPED)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"height": 32, "width": 32, "max_sequence_length": 10}
    classifier = FeatureExtractor.from_pretrained(SHIPPED.parent / "fashion-classifier")
    prompts = ["a red bag on a white background", "something else"]
    result = compare(pipe, POLICY, prompts, [5], STEPS, arguments, progress=False, classifier=classifier)
    known, unknown = result.items
    assert isinstance(known.accelerated.satisfied, bool) and unknown.accelerated.satisfied is None
    assert result.accelerated.satisfied == float(known.accelerated.satisfied), "of those that count"
    call = arguments | {"prompt": prompts[0]}
    plain = images_by_hand(pipe, call, 5, STEPS)
    with dit_accel.apply(pipe, POLICY):
        fast = images_by_hand(pipe, call, 5, STEPS)
    assert known.accelerated.feature_distance == float(feature_distance(fast, plain, classifier)[0]) > 0
    assert "caption satisfied" in result.table()
    assert "satisfied" in result.to_dict()["accelerated"]
    moving = FeatureExtractor.from_pretrained(SHIPPED.parent / "shapes-classifier")
    with pytest.raises(QualityError, match="give \\[B, F, 3, H, W\\]"):
        compare(pipe, POLICY, prompts, [5], STEPS, arguments, progress=False, classifier=moving)


def test_balanced_beats_fewer_steps_at_equal_cost_on_the_trained_pipeline() -> None:
    from diffusers import DiffusionPipeline

    from dit_accel.cli import call_defaults

    pipe = DiffusionPipeline.from_pretrained(SHIPPED)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red dress on a white background", "a blue boot on a black background"]
    result = compare(pipe, "balanced", prompts, [0], 40, call_defaults(SHIPPED), progress=False)
    assert result.accelerated.flops_share < 0.5
    assert abs(result.fewer.flops_share - result.accelerated.flops_share) < 0.02
    assert result.accelerated.psnr.mean > result.fewer.psnr.mean + 3
    assert result.accelerated.ssim and result.fewer.ssim and result.accelerated.ssim.mean > result.fewer.ssim.mean
