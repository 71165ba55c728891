"""The knobs of the four mechanisms: they show a policy, and write back no more than was turned."""

import pytest

from dit_accel import Policy
from dit_accel.studio.accepted import names
from dit_accel.studio.controls import OWN, chosen_policy
from dit_accel.studio.knobs import PANELS, values_of, with_values

PLACES = {}
for panel in PANELS:
    PLACES[panel.part] = len(PLACES)
    for knob in panel.knobs:
        PLACES[f"{panel.part}.{knob.name}"] = len(PLACES)


def turned(policy: Policy, **changes: object) -> Policy:
    values = values_of(policy.to_dict())
    for path, value in changes.items():
        values[PLACES[path.replace("__", ".")]] = value
    return Policy.from_dict(with_values(policy.to_dict(), values))


@pytest.mark.parametrize("name", names())
def test_knobs_that_nobody_turned_change_nothing(name: str) -> None:
    policy = Policy.named(name)
    assert turned(policy) == policy


def test_a_knob_changes_its_setting_alone() -> None:
    before = Policy.named("balanced")
    after = turned(before, cache__threshold=0.01, cache__max_skips=3.0)  # browsers send floats
    assert after.cache is not None and before.cache is not None
    assert (after.cache.threshold, after.cache.max_skips, after.cache.scope) == (0.01, 3, before.cache.scope)
    assert after.forecast == before.forecast


def test_mechanisms_are_turned_on_and_off() -> None:
    both = turned(Policy.named("balanced"), weights=True, attention=True, attention__density=0.5)
    assert both.weights is not None and both.weights.bits == 4
    assert both.attention is not None and both.attention.density == 0.5 and both.attention.min_tokens == 0
    assert turned(both, cache=False, forecast=False, weights=False, attention=False) == Policy()


def test_another_predictor_leaves_the_settings_of_the_last_one_behind() -> None:
    after = turned(Policy.named("balanced"), forecast__predictor="taylor")
    assert after.forecast is not None
    assert (after.forecast.predictor, after.forecast.damping, after.forecast.corrector) == ("taylor", 0.0, 2)


def test_the_name_is_kept_until_a_knob_is_turned() -> None:
    base = Policy.named("fast").to_dict()
    values = values_of(base)
    assert chosen_policy("fast", base, values) == "fast"
    values[PLACES["cache.warmup"]] = 6
    assert chosen_policy("fast", base, values)["cache"]["warmup"] == 6  # even before the page says "your own"
    assert chosen_policy(OWN, base, values_of(base)) == base


def test_what_hidden_knobs_say_is_not_meant() -> None:
    by_schedule = Policy.named("taylorseer-lite")
    assert by_schedule.cache is not None and by_schedule.cache.threshold is None
    assert turned(by_schedule, cache__threshold=0) == by_schedule  # browsers send 0 for a slider without a value
