"""Validation of settings, every branch, on a small class of its own and on the shipped ones."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from dit_accel.cache import BlockCache
from dit_accel.errors import DitAccelError, PolicyError, nearest
from dit_accel.forecast import Forecast
from dit_accel.settings import Settings, fields_of, from_mapping, schema_of, setting


@dataclass(frozen=True)
class Inner(Settings):
    size: int = setting(2, "how large", minimum=1, maximum=9)


@dataclass(frozen=True)
class Outer(Settings):
    share: float | None = setting(0.5, "how much", minimum=0.0)
    capped: float = setting(0.5, "how much at most", maximum=1.0)
    kind: str = setting("round", "which form", choices=("round", "square"))
    on: bool = setting(False, "whether")
    inner: Inner | None = setting(None, "the inner one")


def one_sentence(error: pytest.ExceptionInfo[DitAccelError]) -> str:
    """The message, after a check that it is one sentence on one line."""
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and ". " not in text and 20 < len(text) < 300, text
    return text


WRONG = [
    ({"share": "0.5"}, "Outer.share is '0.5' (str); give float or null."),
    ({"share": True}, "Outer.share is True (bool); give float or null."),
    ({"share": math.nan}, "Outer.share is nan; give a finite number."),
    ({"share": math.inf}, "Outer.share is inf; give a finite number."),
    ({"share": -0.25}, "Outer.share is -0.25; give a value of at least 0."),
    ({"share": 10**400}, "(int); give float or null."),
    ({"capped": None}, "Outer.capped is None (NoneType); give float."),
    ({"capped": 1.5}, "Outer.capped is 1.5; give a value of at most 1."),
    ({"kind": "squre"}, "Outer.kind is 'squre'; did you mean 'square'? allowed: round, square."),
    ({"kind": 3}, "Outer.kind is 3 (int); give str."),
    ({"on": 1}, "Outer.on is 1 (int); give bool."),
    ({"inner": {"size": 3}}, "(dict); give Inner or null."),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_wrong_value_is_refused_in_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as error:
        Outer(**values)
    assert message in one_sentence(error)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "Inner.size is 0; give a value of at least 1 and at most 9."),
        (10, "Inner.size is 10; give a value of at least 1 and at most 9."),
        (2.0, "Inner.size is 2.0 (float); give int."),
        (True, "Inner.size is True (bool); give int."),
        (None, "give int."),
        (10**400, "Inner.size is"),
    ],
)
def test_a_wrong_integer_is_refused_in_one_sentence(value: Any, message: str) -> None:
    with pytest.raises(PolicyError) as error:
        Inner(size=value)
    assert message in one_sentence(error)


def test_an_integer_is_taken_for_a_float_and_becomes_one() -> None:
    assert type(Outer(share=1).share) is float
    assert Outer(share=1) == Outer(share=1.0) and hash(Outer(share=1)) == hash(Outer(share=1.0))


@pytest.mark.parametrize("edge", [{"share": 0.0}, {"share": None}, {"capped": 1.0}, {"inner": Inner(9)}])
def test_values_on_the_edge_are_allowed(edge: dict[str, Any]) -> None:
    assert all(getattr(Outer(**edge), name) == value for name, value in edge.items())


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Outer().share = 0.1  # type: ignore[misc]


@pytest.mark.parametrize("value", [Outer(), Outer(share=None, kind="square", on=True, inner=Inner(5))])
def test_a_dictionary_gives_the_same_settings_back(value: Outer) -> None:
    data = value.to_dict()
    assert set(data) == {"share", "capped", "kind", "on", "inner"}
    assert from_mapping(Outer, data) == value and hash(from_mapping(Outer, data)) == hash(value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"shar": 1}, "Outer has no setting 'shar'; did you mean 'share'? allowed: "),
        ({"zzz": 1}, "Outer has no setting 'zzz'; allowed: capped, inner, kind, on, share."),
        ({7: 1}, "Outer has no setting 7; allowed: "),
        ({"inner": {"sise": 1}}, "Outer.inner has no setting 'sise'; did you mean 'size'? allowed: size."),
        ({"inner": 4}, "Outer.inner is 4; give a mapping of size."),
        ([1, 2], "Outer is [1, 2]; give a mapping of share, capped, kind, on, inner."),
        (None, "Outer is None; give a mapping of"),
    ],
)
def test_a_wrong_mapping_is_refused_in_one_sentence(data: Any, message: str) -> None:
    with pytest.raises(PolicyError) as error:
        from_mapping(Outer, data)
    assert message in one_sentence(error)


@pytest.mark.parametrize("place", ["share", "inner", "kind"])
def test_the_message_stays_short_for_a_value_that_nests_without_end(place: str) -> None:
    """Twelve YAML aliases write out a list of 10^12 words; four do for this test."""
    bomb: list[Any] = ["word"] * 10
    for _ in range(3):
        bomb = [bomb] * 10
    with pytest.raises(PolicyError) as error:
        from_mapping(Outer, {place: bomb})
    assert len(str(error.value)) < 400


def test_missing_keys_take_their_defaults() -> None:
    assert from_mapping(Outer, {}) == Outer()
    assert from_mapping(Outer, {"inner": {}}).inner == Inner()


def test_schema_says_types_limits_choices_and_help() -> None:
    schema = schema_of(Outer)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["share"] == {
        "anyOf": [{"type": "number"}, {"type": "null"}],
        "description": "how much",
        "minimum": 0.0,
    }
    assert schema["properties"]["capped"]["maximum"] == 1.0
    assert schema["properties"]["kind"]["enum"] == ["round", "square"]
    assert schema["properties"]["inner"]["anyOf"][0]["properties"]["size"]["maximum"] == 9


@pytest.mark.parametrize("settings", [BlockCache, Forecast])
def test_every_shipped_setting_explains_itself(settings: type) -> None:
    for field, _ in fields_of(settings):
        assert len(field.metadata["help"]) > 20, field.name


SHIPPED_WRONG = [
    (BlockCache, {"threshold": None, "max_skips": None}, "both null"),
    (BlockCache, {"threshold": -1.0}, "at least 0"),
    (BlockCache, {"warmup": 0}, "at least 1"),
    (BlockCache, {"tail": -1}, "at least 0"),
    (BlockCache, {"max_skips": -1}, "at least 0"),
    (BlockCache, {"probe_blocks": -1}, "at least 0"),
    (BlockCache, {"probe_blocks": 0}, "no probe to compare with"),
    (BlockCache, {"reference": "ancher"}, "did you mean 'anchor'?"),
    (Forecast, {"predictor": "tailor"}, "did you mean 'taylor'?"),
    (Forecast, {"order": 5}, "at least 0 and at most 4"),
    (Forecast, {"predictor": "taylor", "damping": 0.5}, "give the predictor 'newton'"),
    (Forecast, {"scale": 0.7}, "give the predictor 'hermite'"),
    (Forecast, {"order": True}, "give int"),
    (Forecast, {"coordinate": "time"}, "allowed: log-snr, sigma, step"),
    (Forecast, {"predictor": "reuse", "order": 2}, "which has no order"),
]


@pytest.mark.parametrize(("settings", "values", "message"), SHIPPED_WRONG)
def test_shipped_settings_refuse_what_cannot_work(settings: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as error:
        settings(**values)
    assert message in one_sentence(error)


@pytest.mark.parametrize(
    ("cache", "can_skip"),
    [
        (BlockCache(), True),
        (BlockCache(threshold=0), False),
        (BlockCache(max_skips=0), False),
        (BlockCache(threshold=None), True),
    ],
)
def test_can_skip(cache: BlockCache, can_skip: bool) -> None:
    assert cache.can_skip is can_skip


@pytest.mark.parametrize(("warmup", "tail", "fewest"), [(1, 0, 3), (2, 0, 3), (3, 1, 5), (4, 2, 7)])
def test_fewest_steps(warmup: int, tail: int, fewest: int) -> None:
    assert BlockCache(warmup=warmup, tail=tail).fewest_steps == fewest


@pytest.mark.parametrize(
    ("forecast", "anchors"),
    [(Forecast("reuse", 0), 1), (Forecast("reuse"), 1), (Forecast(), 2), (Forecast(order=2), 3)],
)
def test_anchors_kept(forecast: Forecast, anchors: int) -> None:
    assert forecast.anchors == anchors


def test_nearest_names_all_words_in_order() -> None:
    assert nearest("slow", ["b", "a"]) == "allowed: a, b"
    assert nearest("slow", ["slower", "fast"]) == "did you mean 'slower'? allowed: fast, slower"
