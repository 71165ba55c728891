"""What may be asked for: sentences for what is not, and nothing that reads a file."""

import json
import math
from typing import Any

import pytest

from dit_accel import BlockSparse, Policy, VectorQuant
from dit_accel.errors import ArgumentError, DitAccelError
from dit_accel.studio.accepted import accepted, names
from dit_accel.studio.limits import Limits, choice, number, text, whole
from dit_accel.studio.prompt_list import rows_of
from dit_accel.studio.studio import Studio

LIMITS = Limits()


@pytest.mark.parametrize("value", ["3", None, True, 2.5, math.nan, math.inf, 0, 11, [3], {"a": 1}])
def test_whole_numbers_are_whole_and_in_range(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"steps is .+; give a whole number from 1 to 10"):
        whole("steps", value, 1, 10)


def test_browsers_may_send_whole_numbers_as_floats() -> None:
    assert whole("steps", 4.0, 1, 10) == 4 and type(whole("steps", 4.0, 1, 10)) is int
    with pytest.raises(ArgumentError, match="in steps of 4"):
        whole("height", 30, 4, 64, 4)


@pytest.mark.parametrize("value", ["1", None, False, math.nan, -0.1, 30.5])
def test_numbers_are_finite_and_in_range(value: Any) -> None:
    with pytest.raises(ArgumentError, match="give a number from 0 to 30"):
        number("guidance", value, 0, 30)


@pytest.mark.parametrize("value", [3, None, "x" * 11, "two\nlines", "nul\0", "\ud800", "\x1b[31m"])
def test_text_is_one_plain_line(value: Any) -> None:
    with pytest.raises(ArgumentError, match="prompt"):
        text("prompt", value, 10)


def test_a_choice_names_the_nearest() -> None:
    with pytest.raises(ArgumentError, match="did you mean 'tiny-flux'"):
        choice("pipeline", "tiny-flx", ["tiny-flux", "tiny-wan"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("/etc/passwd", "allowed: "),
        ("../../policy.json", "allowed: "),
        ("seerattention:/etc/passwd", "allowed: "),
        ("vq4dit", "allowed: "),  # takes minutes
        (7, "give a name, or a policy as JSON"),
        ("{", "no valid JSON"),
        ("{" + '"a":{' * 9999, "no valid JSON"),
        ('{"cash": {}}', "did you mean 'cache'"),
        ('{"cache": {"threshold": "much"}}', "BlockCache.threshold"),
        ('{"cache": {"threshold": NaN}}', "finite"),
        ("{" + " " * 70_000 + "}", "characters"),
        ({"attention": {"score": "gate", "gate": "/etc/passwd"}}, "gate names a file"),
        ({"weights": {"keep": "disk"}}, "writes no weights"),
        ({"weights": {"method": "feedback"}}, "dit-accel quantize"),
        ({"weights": {"mean_bits": 2.5}}, "dit-accel quantize"),
    ],
)
def test_policies_that_are_refused(given: Any, sentence: str) -> None:
    with pytest.raises(DitAccelError, match=sentence):
        accepted(given, LIMITS)


def test_policies_that_are_accepted() -> None:
    assert accepted("balanced", LIMITS) == (Policy.named("balanced"), "balanced")
    policy = Policy(weights=VectorQuant(bits=3), attention=BlockSparse(0.5))
    assert accepted(json.dumps(policy.to_dict()), LIMITS) == (policy, None)
    for name in names():
        assert accepted(name, LIMITS)[1] == name


def test_sizes_are_capped_by_what_the_pipeline_makes(studio: Studio) -> None:
    from dit_accel.studio.wanted import wanted

    model = studio.model("tiny-flux")
    asked: dict[str, Any] = {"prompt": "a boot", "seed": 0, "steps": 10}
    assert wanted(model, LIMITS, **asked, height=64).arguments["height"] == 64
    for change, sentence in (
        ({"height": 33}, "from 2 to 128 in steps of 2"),
        ({"width": 4096}, "from 2 to 128"),
        ({"height": 128, "width": 128, "steps": 200}, r"height \* width \* frames \* steps"),
        ({"frames": 3}, "makes images"),
        ({"steps": 3, "policy": "balanced"}, "too few for this policy"),
    ):
        with pytest.raises(ArgumentError, match=sentence):
            wanted(model, LIMITS, **(asked | change))


@pytest.mark.parametrize(
    ("given", "name", "sentence"),
    [
        ("", "", "empty"),
        (3, "", "empty"),
        ("a boot\n" * 201, "", "201 items"),
        ("x" * (1 << 20) + "x", "", "bytes"),
        ("a" * 501, "", "Item 1: prompt has 501 characters"),
        ("grid: {}", "sweep.yaml", "YAML"),
        ('{"prompt": "a boot", "output": "../../x"}', "", "output"),
        ('{"prompt": "a boot", "policy": "/etc/passwd.json"}', "", "allowed: "),
        ('{"prompt": "a boot", "max_sequence_length": 9}', "", "sets max_sequence_length"),
        ('{"prompt": "a boot", "num_inference_steps": 100000}', "", "num_inference_steps"),
        ('{"prompt": "a boot", "height": 4096}', "", "Item 1: height"),
        ('prompt,seed\n"a boot', "list.csv", "CSV"),
    ],
)
def test_lists_that_are_refused(studio: Studio, given: Any, name: str, sentence: str) -> None:
    with pytest.raises(DitAccelError, match=sentence):
        rows_of(given, name, studio.model("tiny-flux"), LIMITS, 8, "fast")


def test_lists_of_every_kind(studio: Studio) -> None:
    model = studio.model("tiny-flux")
    lines = rows_of("a red boot\n\na blue coat\n", "", model, LIMITS, 8, "fast")
    assert [(row["prompt"], row["seed"], row["policy"]) for row in lines] == [
        ("a red boot", 0, "fast"),
        ("a blue coat", 1, "fast"),
    ]
    table = rows_of("prompt,seed,true_cfg_scale\na boot,7,2.5\n", "list.csv", model, LIMITS, 8, "fast")
    assert table[0]["seed"] == 7 and table[0]["true_cfg_scale"] == 2.5
    own = rows_of('{"prompt": "a boot", "seed": 1, "policy": {"cache": null}}', "", model, LIMITS, 8, "fast")
    assert own[0]["policy"] == Policy().to_dict()
