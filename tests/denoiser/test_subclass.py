"""One-off subclasses: put on, taken off, copied and pickled."""

from __future__ import annotations

import abc
import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dit_accel.denoiser.subclass import owner_of, wrap_instance


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: int):
        self.value = value

    def __call__(self) -> str:
        return "plain"


class Abstract(abc.ABC):
    value = 1

    @abc.abstractmethod
    def __call__(self) -> str: ...


class Concrete(Abstract):
    def __call__(self) -> str:
        return "plain"


class Reducing:
    """Says itself how it is pickled, by its type."""

    def __init__(self, value: int):
        self.value = value

    def __call__(self) -> str:
        return "plain"

    def __reduce__(self) -> Any:
        return type(self), (self.value,)


class Plain(nn.Module):
    """A module with a parameter, a buffer and a child."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("offset", torch.ones(2))
        self.value = 1

    def forward(self) -> str:
        return "plain"


class Home:
    class Inner(Plain):
        """A class whose full name is longer than its name."""


MAKERS: dict[str, Callable[[], Any]] = {
    "module": Plain,
    "inner class": Home.Inner,
    "slots": lambda: Slotted(1),
    "metaclass": Concrete,
    "own reduce": lambda: Reducing(1),
}
every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def saying(word: str) -> dict[str, Callable[..., Any]]:
    return {"__call__": lambda self: word}


@every_kind
def test_unwrap_gives_exactly_the_class_back(make: Callable[[], Any]) -> None:
    instance, other = make(), make()
    base = type(instance)
    unwrap = wrap_instance(instance, "owner", saying("wrapped"))
    assert instance() == "wrapped" and owner_of(instance) == "owner"
    assert other() == "plain" and type(other) is base and owner_of(other) is None
    unwrap()
    assert type(instance) is base and instance() == "plain" and owner_of(instance) is None
    assert not [name for name in vars(base) if "dit_accel" in name]


@every_kind
def test_an_equal_subclass_is_found_where_classes_are_looked_up(make: Callable[[], Any]) -> None:
    instance, other = make(), make()
    base = type(instance)
    unwraps = [wrap_instance(instance, number, saying("wrapped"), equal=True) for number in range(2)]
    wrap_instance(other, "other", saying("other"), equal=True)
    assert type(instance) is not base and type(instance) in (base,) and base in {type(instance)}
    assert type(instance) in (type(other),) and type(instance) not in (int,) and {base: 1}[type(other)] == 1
    unwraps[0]()
    assert instance() == "wrapped" and type(instance) in (base,)
    unwraps[1]()
    assert type(instance) is base and type(type(instance)) is type(base)
    wrap_instance(instance, 2, saying("wrapped"))
    assert type(instance) not in (base,)


@every_kind
def test_a_wrapped_instance_passes_for_its_class(make: Callable[[], Any]) -> None:
    instance = make()
    base = type(instance)
    wrap_instance(instance, "owner", saying("wrapped"))
    assert isinstance(instance, base) and issubclass(type(instance), base)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(instance), name) == getattr(base, name)
    assert instance.value == 1


COPIERS: dict[str, Callable[[Any], Any]] = {"copy": copy.copy, "deepcopy": copy.deepcopy}
for _protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    COPIERS[f"pickle {_protocol}"] = lambda item, protocol=_protocol: pickle.loads(pickle.dumps(item, protocol))


@every_kind
@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS.keys())
@pytest.mark.parametrize("wraps", [1, 2])
def test_copies_are_of_the_plain_class(make: Callable[[], Any], copier: Callable[[Any], Any], wraps: int) -> None:
    instance = make()
    base = type(instance)
    try:
        copier(instance)
    except TypeError as error:  # slots need protocol 2
        pytest.skip(str(error))
    for number in range(wraps):
        wrap_instance(instance, number, saying(f"wrapped {number}"))
    copied = copier(instance)
    assert type(copied) is base and copied() == "plain" and copied.value == 1
    assert instance() == f"wrapped {wraps - 1}"


def test_parameters_of_a_module_stay_what_they_are() -> None:
    module = Plain()
    before = {name: value.data_ptr() for name, value in module.state_dict().items()}
    attributes = set(vars(module))
    unwrap = wrap_instance(module, "owner", saying("wrapped"))
    assert {name: value.data_ptr() for name, value in module.state_dict().items()} == before
    assert [name for name, _ in module.named_parameters()] == ["linear.weight", "linear.bias"]
    assert set(vars(module)) == attributes
    copied = copy.deepcopy(module)
    assert copied.linear.weight.data_ptr() != module.linear.weight.data_ptr()
    assert torch.equal(copied.linear.weight, module.linear.weight)
    unwrap()
    assert set(vars(module)) == attributes


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_wraps_come_off_in_any_order(order: tuple[int, ...]) -> None:
    module = Plain()
    unwraps = [wrap_instance(module, number, saying(f"wrapped {number}")) for number in range(3)]
    left = set(range(3))
    for number in order:
        unwraps[number]()
        left.remove(number)
        assert module() == (f"wrapped {max(left)}" if left else "plain")
        assert owner_of(module) == max(left, default=None)
    assert type(module) is Plain


def test_two_instances_of_one_class_are_wrapped_apart() -> None:
    first, second = Plain(), Plain()
    unwrap_first = wrap_instance(first, 1, saying("first"))
    unwrap_second = wrap_instance(second, 2, saying("second"))
    assert (first(), second()) == ("first", "second")
    unwrap_first()
    assert (first(), second()) == ("plain", "second")
    unwrap_second()
    assert type(first) is type(second) is Plain


@pytest.mark.parametrize("wraps", [1, 2])
def test_unwrapping_twice_does_no_harm(wraps: int) -> None:
    module = Plain()
    unwraps = [wrap_instance(module, number, saying(f"wrapped {number}")) for number in range(wraps)]
    for unwrap in [*unwraps, *unwraps]:
        unwrap()
    assert type(module) is Plain
    wrap_instance(module, "new", saying("new"))
    unwraps[0]()
    assert module() == "new"


def test_a_class_put_on_top_by_somebody_else_is_kept() -> None:
    """torch's parametrize and FSDP change the class of a module in the same way."""
    module = Plain()
    unwrap = wrap_instance(module, "owner", saying("wrapped"))
    foreign = type("Foreign", (type(module),), {"extra": lambda self: "extra"})
    module.__class__ = foreign
    unwrap()
    assert type(module) is foreign
    assert module() == "plain" and owner_of(module) is None
