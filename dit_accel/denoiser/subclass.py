"""One-off subclasses: change `__call__` or `step` of one instance, never of a class, and take it back exactly.

Why not `forward`, and why not an attribute on the instance: `torch.compile` compiles what lies under `__call__`, so a
decision made there stays outside compiled code; and a class is not copied, so copies and pickles are plain again.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

_MARK = "_dit_accel_owner"
_REMOVED = "_dit_accel_removed"


def wrap_instance(
    instance: Any, owner: Any, methods: dict[str, Callable[..., Any]], *, equal: bool = False
) -> Callable[[], None]:
    """Give `instance` a subclass of its own class with these methods; returns the inverse.

    owner: what `owner_of` answers while the wrap is on. equal: the subclass is equal to the class, for those who look
    one up among several, as `DiffusionPipeline.from_pipe` does. Wraps of one instance may be taken back in any order:
    one that lies under another loses its methods at once, and its place in the chain with the one above it.
    """
    return wrap_instances([instance], owner, methods, equal=equal)


def wrap_instances(
    instances: Sequence[Any], owner: Any, methods: dict[str, Callable[..., Any]], *, equal: bool = False
) -> Callable[[], None]:
    """The same for several instances of one class, which share the subclass: `torch.compile` makes one graph for blocks
    of one class."""
    base: Any = type(instances[0])

    def reduce_as_base(self: Any, protocol: Any) -> Any:
        """Copies and pickles are of the plain class: they belong to nobody's session."""
        reduced = base.__reduce_ex__(self, protocol)
        if isinstance(reduced, tuple) and len(reduced) > 1:
            make, arguments, *rest = reduced
            if make is type(self):
                make = base
            elif make is copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue]
                make = base.__new__  # pickle allows the other for the instance's own class only
            return (make, tuple(base if item is type(self) else item for item in arguments), *rest)
        return reduced

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__slots__": (),  # the layout of the base, so that an instance of it may change over
        "__reduce_ex__": reduce_as_base,
        _MARK: owner,
        **methods,
    }
    wrapped = (_equal_to_plain(type(base)) if equal else type(base))(base.__name__, (base,), namespace)
    for instance in instances:
        instance.__class__ = wrapped

    def unwrap() -> None:
        for name in {_MARK, *methods} & vars(wrapped).keys():
            delattr(wrapped, name)
        setattr(wrapped, _REMOVED, True)
        for instance in instances:
            while _REMOVED in vars(type(instance)):
                instance.__class__ = type(instance).__base__

    return unwrap


def plain_class(kind: type) -> type:
    """A class without the wraps on it."""
    while {_MARK, _REMOVED} & vars(kind).keys():
        kind = kind.__base__  # pyright: ignore[reportAssignmentType]
    return kind


class _EqualToPlain(type):
    """Metaclass of subclasses that are equal to the class under all wraps."""

    def __eq__(cls, other: object) -> bool:
        return isinstance(other, type) and plain_class(cls) is plain_class(other)

    def __hash__(cls) -> int:
        return hash(plain_class(cls))


@functools.cache
def _equal_to_plain(kind: type) -> type:
    """The same, of another metaclass."""
    if issubclass(kind, _EqualToPlain):
        return kind
    return _EqualToPlain if kind is type else type(kind.__name__, (_EqualToPlain, kind), {})


def owner_of(instance: Any) -> Any | None:
    """The owner of the wrap on this instance, or `None` where it has none."""
    return getattr(type(instance), _MARK, None)


def alike(kinds: Iterable[Hashable]) -> list[list[int]]:
    """The numbers of the items of each kind: those that may share a subclass."""
    groups: dict[Hashable, list[int]] = {}
    for number, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(number)
    return list(groups.values())


def owners_of(instance: Any) -> list[Any]:
    """The owners of all wraps on this instance, the outermost first."""
    return [vars(kind)[_MARK] for kind in type(instance).__mro__ if _MARK in vars(kind)]
