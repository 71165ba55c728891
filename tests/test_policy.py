"""Policies: names, overrides, dictionaries, files and the published schema."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dit_accel.cache import BlockCache
from dit_accel.errors import PolicyError
from dit_accel.forecast import Forecast
from dit_accel.policy import FIELDS, Policy, as_policy, policies
from dit_accel.presets import PRESETS

NAMES = sorted(set(PRESETS) - {"seerattention"})  # which has no policy without learned gates
ODD = Policy(BlockCache(threshold=1e-5, reference="forecast", accumulate=True, max_skips=None), Forecast("taylor", 2))
ENDINGS = [".json", ".yaml", ".yml"]


def refusal(error: pytest.ExceptionInfo[PolicyError]) -> str:
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text, text
    return text


# ------------------------------------------------------------------------------------------------ what fits together


def test_the_empty_policy_is_exact() -> None:
    assert Policy().is_exact and Policy() == Policy.named("exact")
    assert Policy(BlockCache(threshold=0)).is_exact and Policy(BlockCache(max_skips=0)).is_exact
    assert not Policy(BlockCache()).is_exact


def test_a_forecast_without_a_cache_is_refused() -> None:
    with pytest.raises(PolicyError) as error:
        Policy(forecast=Forecast())
    assert "without Policy.cache" in refusal(error)


@pytest.mark.parametrize("forecast", [None, Forecast("reuse", 0), Forecast("newton", 0), Forecast("taylor", 0)])
def test_the_reference_forecast_needs_a_forecast(forecast: Forecast | None) -> None:
    with pytest.raises(PolicyError) as error:
        Policy(BlockCache(reference="forecast"), forecast)
    assert "nothing is forecast" in refusal(error)


def test_without_a_forecast_the_last_residual_is_reused() -> None:
    assert Policy(BlockCache()).predictor == Forecast("reuse", order=0)
    assert Policy(BlockCache(), Forecast("taylor")).predictor == Forecast("taylor")


def test_a_wrong_part_is_refused() -> None:
    with pytest.raises(PolicyError) as error:
        Policy(cache=0.1)  # type: ignore[arg-type]
    assert refusal(error) == "Policy.cache is 0.1 (float); give BlockCache or null."


def test_equal_policies_are_one_key() -> None:
    assert len({Policy(BlockCache(threshold=1)), Policy(BlockCache(threshold=1.0)), Policy()}) == 2


# --------------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_described_and_accepted(name: str) -> None:
    assert len(policies()[name]) > 20 and "\n" not in policies()[name]
    assert Policy.named(name) == PRESETS[name].policy == as_policy(name)


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(PolicyError) as error:
        Policy.named("balance")
    assert "did you mean 'balanced'?" in refusal(error)
    assert all(name in refusal(error) for name in NAMES)


def test_overrides_reach_the_cache_and_the_forecast() -> None:
    base, changed = Policy.named("balanced"), Policy.named("balanced", threshold=0.2, order=2)
    assert base.cache is not None and changed.cache is not None and changed.forecast is not None
    assert (changed.cache.threshold, changed.forecast.order) == (0.2, 2)
    assert changed.cache.warmup == base.cache.warmup
    assert Policy.named("balanced") == base


def test_overrides_are_judged_together_whatever_their_order() -> None:
    """Either one alone would be refused: threshold and max_skips null, or a reuse of higher order."""
    timed = BlockCache(threshold=None, max_skips=2, warmup=1)
    expected = Policy(BlockCache(threshold=0.1, max_skips=None, warmup=1))
    assert Policy.named("exact", cache=timed, max_skips=None, threshold=0.1) == expected
    assert Policy.named("exact", cache=timed, threshold=0.1, max_skips=None) == expected


def test_a_whole_field_is_replaced_and_then_overridden() -> None:
    assert Policy.named("balanced", forecast=None, reference="anchor", unit="stack").forecast is None
    assert Policy.named("exact", cache=BlockCache(tail=2)).cache == BlockCache(tail=2)
    changed = Policy.named("exact", cache=BlockCache(tail=2), warmup=5)
    assert changed.cache == BlockCache(tail=2, warmup=5)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("balanced", {"treshold": 1}, "did you mean 'threshold'?"),
        ("balanced", {"can_skip": True}, "no setting 'can_skip'"),
        ("fbcache", {"order": 1}, "no setting 'order'"),
        (
            "exact",
            {"threshold": 0.1},
            "no setting 'threshold'; did you mean 'resolution'? allowed: attention, cache, forecast, resolution, "
            "weights.",
        ),
        ("balanced", {"threshold": "high"}, "give float or null"),
        ("balanced", {"cache": None}, "without Policy.cache"),
    ],
)
def test_a_wrong_override_is_refused(name: str, override: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as error:
        Policy.named(name, **override)
    assert message in refusal(error)


# ------------------------------------------------------------------------------------------- dictionaries and files


@pytest.mark.parametrize("policy", [*(PRESETS[name].policy for name in NAMES), ODD], ids=[*NAMES, "odd"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_gives_the_same_policy_back(policy: Policy, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"policy{ending}"
    policy.save(path)
    assert Policy.load(path) == policy == as_policy(path) == as_policy(str(path))
    assert Policy.from_dict(policy.to_dict()) == policy == as_policy(policy.to_dict()) == as_policy(policy)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_file_is_plain_and_says_its_version(tmp_path: Path) -> None:
    Policy().save(tmp_path / "a.json")
    ODD.save(tmp_path / "a.yaml")
    assert json.loads((tmp_path / "a.json").read_text()) == {"version": 1} | dict.fromkeys(FIELDS)
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == {"version": 1} | ODD.to_dict()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_failing_save_keeps_the_old_file_and_leaves_nothing_else(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"policy{ending}"
    Policy().save(path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    for target in (path, tmp_path / f"new{ending}"):
        with pytest.raises(OSError, match="disk full"):
            ODD.save(target)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_folder_in_the_way_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "policy.json").mkdir()
    with pytest.raises(OSError):
        Policy().save(tmp_path / "policy.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy.json"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.json", b"\xff\xfe", "not valid JSON"),
        ("a.json", b"[1]", "A policy is a mapping of cache, forecast, weights, attention"),
        ("a.json", b'{"cache": {"threshold": NaN}}', "finite"),
        ("a.json", b'{"cache": {"threshold": 1e999}}', "finite"),
        ("a.json", b'{"version": 2}', "version 2; this dit_accel reads version 1."),
        ("a.json", b'{"version": null}', "version None; this dit_accel reads version 1."),
        ("a.json", b'{"cach": null}', "did you mean 'cache'?"),
        ("a.yaml", b"- 1\n- 2\n", "got list."),
        ("a.yaml", b"", "got NoneType."),
        ("a.yaml", b"cache: {threshold: 0.1\nforecast: [", "not valid YAML"),
        ("a.yaml", b"cache: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a.yml", b"cache: !!python/tuple [1]", "not valid YML"),
        ("a.yaml", b"? [1]\n: 2\n", "not valid YAML"),
        ("a.yaml", b"cache: {threshold: '0.1'}", "BlockCache.threshold is '0.1' (str); give float or null."),
    ],
)
def test_a_bad_file_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PolicyError) as error:
        Policy.load(tmp_path / name)
    assert message in refusal(error)


def test_python_tags_run_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"cache: !!python/object/apply:os.mkdir ['{tmp_path}/ran']")
    with pytest.raises(PolicyError):
        Policy.load(tmp_path / "a.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("use", [Policy.load, Policy().save, as_policy])
def test_another_ending_is_refused(use: Any, tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as error:
        use(tmp_path / "policy.toml")
    assert ".json, .yaml, .yml" in refusal(error)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as error:
        Policy.load(tmp_path / "none.json")
    assert "No such file" in refusal(error)


@pytest.mark.parametrize("wrong", [3, None, ["balanced"], BlockCache()])
def test_something_else_is_no_policy(wrong: Any) -> None:
    with pytest.raises(PolicyError) as error:
        as_policy(wrong)
    assert type(wrong).__name__ in refusal(error)


# ---------------------------------------------------------------------------------------------------------- schema


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_accepts_every_preset(name: str) -> None:
    validator = jsonschema.Draft202012Validator(Policy.schema())
    validator.validate({"version": 1} | PRESETS[name].policy.to_dict())


@pytest.mark.parametrize(
    "data",
    [
        {"cache": {"threshold": -1}},
        {"cache": {"threshold": "0.1"}},
        {"cache": {"treshold": 0.1}},
        {"cache": {"reference": "ancher"}},
        {"cache": {"warmup": 1.5}},
        {"cache": {"accumulate": 1}},
        {"forecast": {"order": 5}},
        {"version": 2},
        {"other": None},
        [],
    ],
)
def test_schema_and_policy_refuse_the_same(data: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(Policy.schema())
    assert not jsonschema.Draft202012Validator(Policy.schema()).is_valid(data)
    with pytest.raises(PolicyError):
        Policy.from_dict(data)


def test_saving_into_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"does not exist, so policy\.json cannot be saved"):
        Policy().save(tmp_path / "missing" / "policy.json")
