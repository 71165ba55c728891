"""calls: every kind of pipeline called in one way, against calls made by hand."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from dit_accel.calls import Caller, Made, class_of, pictures_of
from dit_accel.errors import ArgumentError, DitAccelError
from dit_accel.testing import tiny_pipelines

STEPS = 3


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    built = tiny_pipelines.build(name, 4)
    return built.pipe, {key: value for key, value in built.arguments.items() if key != "output_type"}


def labelled() -> Any:
    """A class-conditional pipeline that can tell seven classes apart, three of them by name."""
    pipe, _ = tiny("dit")
    pipe.transformer.register_to_config(num_embeds_ada_norm=7)
    pipe.labels = {"red dress on white": 3, "red dress on black": 4, "7": 5}
    return pipe


def by_hand(pipe: Any, arguments: dict[str, Any], output_type: str, seed: int = 5) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        made = pipe(**arguments, generator=generator, num_inference_steps=STEPS, output_type=output_type)[0]
    # DiT's pipeline of diffusers 0.38 gives arrays [B, H, W, C], whatever it was asked for
    return made if isinstance(made, torch.Tensor) else torch.from_numpy(made).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("name", "is_video"),
    [("flux", False), ("sd3", False), ("wan", True), ("wan22", True), ("wan_i2v", True), ("mochi", True)],
)
def test_pictures_and_latents_are_those_of_a_call_made_by_hand(name: str, is_video: bool) -> None:
    pipe, arguments = tiny(name)
    made = Caller(pipe, arguments).make(None, 5, STEPS)
    expected = by_hand(pipe, arguments, "pt")
    assert made.is_video is is_video and made.pictures.ndim == (5 if is_video else 4)
    assert torch.equal(made.pictures, expected) and made.seconds > 0
    assert made.frames.shape == (len(expected.flatten(0, -4)), *expected.shape[-3:])
    assert made.latents is not None
    assert torch.equal(made.latents, by_hand(pipe, arguments, "latent").float())


def test_modular_pipelines_and_class_labels_show_no_latents() -> None:
    pipe, arguments = tiny("flux_modular")
    made = Caller(pipe, arguments).make(None, 0, STEPS)
    assert made.pictures.shape[:2] == (1, 3) and not made.is_video and made.latents is None
    pipe = labelled()
    made = Caller(pipe, {"guidance_scale": 2.0}).make("red dress on black", 5, STEPS)
    assert torch.equal(made.pictures, by_hand(pipe, {"guidance_scale": 2.0, "class_labels": [4]}, "pt"))
    assert made.latents is None


def test_the_seed_rules_and_the_callers_own_random_state_is_left_alone() -> None:
    pipe, arguments = tiny("sd3_img2img")
    caller, state = Caller(pipe, arguments), torch.get_rng_state()
    first, again, other = (caller.make(None, seed, STEPS).pictures for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_arrays_where_a_pipeline_gives_no_tensors_and_the_kind_is_learned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = tiny("flux")
    expected = Caller(pipe, arguments).make(None, 0, STEPS)
    plain, asked = pipe.image_processor.postprocess, []

    def arrays_only(image: Any, output_type: str) -> Any:
        asked.append(output_type)
        if output_type == "pt":
            raise ValueError("no tensors here")
        return plain(image, output_type=output_type)

    monkeypatch.setattr(pipe.image_processor, "postprocess", arrays_only)
    caller = Caller(pipe, arguments)
    for _ in range(2):
        assert torch.equal(caller.make(None, 0, STEPS).pictures, expected.pictures)
    assert asked == ["pt", "np", "np"]


def test_a_class_by_name_or_number() -> None:
    pipe = labelled()
    assert class_of(pipe, "red dress on black") == 4 and class_of(pipe, " red dress on white ") == 3
    assert class_of(pipe, "7") == 5 and class_of(pipe, "6") == 6  # a name goes before a number
    for prompt, message in (
        ("red dres on blak", "did you mean 'red dress on black'? give one of its 3 names in pipe.labels, or a number"),
        ("8", "knows no class '8'"),
        ("-1", "a number from 0 to 6."),
    ):
        with pytest.raises(ArgumentError, match=re.escape(message)) as error:
            class_of(pipe, prompt)
        assert str(error.value).count(". ") == 0, "one sentence"
    pipe.labels = {}
    with pytest.raises(ArgumentError, match="knows no class 'dress'; give a number from 0 to 6"):
        class_of(pipe, "dress")


@pytest.mark.parametrize(
    ("name", "guidance"),
    [("flux", "true_cfg_scale"), ("wan", "guidance_scale"), ("sd3", "guidance_scale"), ("dit", "guidance_scale")],
)
def test_which_argument_means_guidance(name: str, guidance: str) -> None:
    pipe, arguments = tiny(name)
    assert Caller(pipe).guidance == guidance
    one, three = (Caller(pipe, arguments | _negative(name) | {guidance: g}).make(None, 0, STEPS) for g in (1.0, 3.0))
    assert not torch.equal(one.pictures, three.pictures)


def _negative(name: str) -> dict[str, Any]:
    return tiny("flux_true_cfg")[1] if name == "flux" else {}


def test_modular_pipelines_have_no_argument_for_guidance() -> None:
    assert Caller(tiny("flux_modular")[0]).guidance is None


def test_wrong_arguments_and_prompts_are_found_before_any_work() -> None:
    pipe, arguments = tiny("wan")
    for given, message in (
        ({"generator": 1}, "'generator' is set by `seeds`"),
        ({"prompt": "a"}, "'prompt' is set by `prompts`"),
        ({"num_frame": 9}, "WanPipeline takes no argument 'num_frame'; did you mean 'num_frames'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Caller(pipe, arguments | given)
    with pytest.raises(ArgumentError, match="give a diffusers pipeline"):
        Caller(pipe.transformer)
    with pytest.raises(ArgumentError, match="knows no class 'a cat'"):
        Caller(labelled()).check([None, "2", "a cat"])
    with pytest.raises(ArgumentError, match="'class_labels' is set by `prompts`"):
        Caller(labelled(), {"class_labels": [1]}).check(["2"])
    Caller(labelled(), {"class_labels": [1]}).check([None])
    with pytest.raises(ArgumentError, match=r"DiTPipeline refused the call: .*class_labels"):
        Caller(labelled()).make(None, 0, STEPS)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 3, 5, 7), (2, 1, 5, 7), (2, 4, 4, 5, 7)])
def test_what_pipelines_return_becomes_pictures(shape: tuple[int, ...]) -> None:
    tensor = torch.rand(shape)
    pictures = tensor[..., :3, :, :]  # without an alpha channel
    array = tensor.movedim(-3, -1).numpy()
    for result in (tensor, list(tensor), array, list(array)):
        assert torch.equal(pictures_of(result), pictures)
    assert torch.equal(pictures_of(tensor.half()), pictures.half().float())
    whole = (array * 255).round().astype(np.uint8)
    assert float((pictures_of(whole) - pictures).abs().max()) <= 0.5 / 255 + 1e-6
    assert Made(pictures, None, 1.0).frames.shape == (len(tensor.flatten(0, -4)), *pictures.shape[-3:])


def test_what_is_no_picture_is_refused() -> None:
    for result, message in (
        (torch.rand(3, 5, 7), r"\[3, 5, 7\]"),
        (torch.rand(1, 3, 5, 7) * 4 - 2, "instead of 0 to 1"),
    ):
        with pytest.raises(DitAccelError, match=message):
            pictures_of(result)
    assert pictures_of(torch.full((1, 3, 5, 7), float("nan"))).isnan().all()  # the measures tell of it
