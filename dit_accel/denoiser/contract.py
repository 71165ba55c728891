"""Contract: what one observed forward says about the calls between a denoiser and its blocks.

Learned by behaviour: the order of the calls, which input each output continues, and which run of calls is the stack
whose middle may be skipped. A refused contract says why, and the denoiser is then always computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dit_accel.diffusers_bridge import tensor_version

Key = int | str  # where an argument stands: position or keyword


class ContractChanged(Exception):
    """A forward with skipped blocks left the learned contract: its result must not be used."""


@dataclass(frozen=True)
class Contract:
    """How the blocks of one denoiser are called for inputs of one shape.

    sequence: block numbers in call order; stack: positions in `sequence` that belong to the stack, in order;
    probe: how many of them run on every step; passes: for each position between probe and tail, the argument that each
    output repeats (`None` for an output that is `None`); stream: output of the probe that the indicator looks at, and
    the argument of the head that it continues; residual_from: for each output of the tail, the output of the last probe
    block that it is a residual to, or `None` for an absolute value; tail_structured: the tail returns a tuple; refusal:
    why nothing can be skipped.
    """

    sequence: tuple[int, ...]
    stack: tuple[int, ...] = ()
    probe: int = 1
    passes: Mapping[int, tuple[Key | None, ...] | Key] | None = None
    stream: tuple[int, Key] = (0, 0)
    residual_from: tuple[int | None, ...] = ()
    tail_structured: bool = False
    refusal: str | None = None

    @cached_property
    def stack_set(self) -> frozenset[int]:
        return frozenset(self.stack)

    @property
    def head(self) -> int:
        return self.stack[0]

    @property
    def probe_end(self) -> int:
        return self.stack[self.probe - 1]

    @property
    def tail(self) -> int:
        return self.stack[-1]

    def pass_through(self, position: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a skipped block returns: its own inputs, in the structure of its outputs."""
        assert self.passes is not None
        keys = self.passes[position]
        try:
            if isinstance(keys, tuple):
                return tuple(None if key is None else argument(key, args, kwargs) for key in keys)
            return argument(keys, args, kwargs)
        except (IndexError, KeyError):
            raise ContractChanged(f"block call {position} lacks the argument that it had") from None


def argument(key: Key, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument of a call at a position or keyword."""
    return args[key] if isinstance(key, int) else kwargs[key]


def outputs_of(result: Any) -> tuple[Any, ...]:
    """The outputs of a block as a tuple, whether it returns one or several."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


@dataclass
class _Seen:
    """One tensor of a call, without keeping it alive."""

    ref: weakref.ref[Tensor]
    shape: torch.Size
    dtype: torch.dtype
    version: int | str

    @staticmethod
    def of(tensor: Tensor) -> _Seen:
        return _Seen(weakref.ref(tensor), tensor.shape, tensor.dtype, tensor_version(tensor))

    def like(self, other: _Seen) -> bool:
        return self.shape == other.shape and self.dtype == other.dtype


@dataclass
class _Call:
    block: int
    kind: type
    owner: str
    inputs: dict[Key, _Seen]
    outputs: list[_Seen | None]
    structured: bool
    problem: str | None
    flops: int = 0


class Observer:
    """Watches one computed forward and writes the contract."""

    def __init__(self, probe_blocks: int, flops_so_far: Callable[[], int]):
        self.probe_blocks, self.flops_so_far = probe_blocks, flops_so_far
        self.calls: list[_Call] = []
        self.links: list[dict[Key, tuple[int, int]]] = []  # per call: argument -> (earlier call, output) it came from
        self.written_between = False  # code between blocks writes into their outputs in place

    def call(self, block: int, kind: type, owner: str, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Run one block and note what went in and came out."""
        pairs = [(key, value) for key, value in [*enumerate(args), *kwargs.items()]]
        inputs = {key: _Seen.of(value) for key, value in pairs if isinstance(value, Tensor)}
        self._link(inputs, dict(pairs))
        caches = [(value, _fingerprint(value)) for _, value in pairs if _is_mutable(value)]
        start = self.flops_so_far()
        result = run()
        problem = None
        if any(tensor_version(v) != inputs[k].version for k, v in pairs if isinstance(v, Tensor)):
            problem = "writes into its input in place"
        elif any(_fingerprint(value) != before for value, before in caches):
            problem = "writes to a cache of its own (an argument that it changes)"
        values = outputs_of(result)
        if not all(value is None or isinstance(value, Tensor) for value in values):
            problem = "returns something that is not a tensor"
        outputs = [_Seen.of(v) if isinstance(v, Tensor) else None for v in values]
        structured = isinstance(result, (tuple, list))
        self.calls.append(_Call(block, kind, owner, inputs, outputs, structured, problem, self.flops_so_far() - start))
        return result

    def _link(self, inputs: dict[Key, _Seen], values: dict[Key, Any]) -> None:
        """Note which inputs are, by identity, outputs of earlier calls."""
        links: dict[Key, tuple[int, int]] = {}
        for key, seen in inputs.items():
            for number in range(len(self.calls) - 1, -1, -1):
                source = next(
                    (p for p, out in enumerate(self.calls[number].outputs) if out and out.ref() is values[key]), None
                )
                if source is not None:
                    out = self.calls[number].outputs[source]
                    assert out is not None
                    self.written_between |= out.version != seen.version
                    links[key] = (number, source)
                    break
        self.links.append(links)

    def contract(self) -> Contract:
        """The contract of the observed forward."""
        sequence = tuple(call.block for call in self.calls)
        base = Contract(sequence)
        if not self.calls:
            return _refuse(base, "no block was called")
        roles = [self._roles(number) for number in range(len(self.calls))]
        stack = max(self._chains(roles), key=lambda chain: (len(chain), sum(self.calls[p].flops for p in chain)))
        needed = self.probe_blocks + 2
        if len(stack) < needed:
            return _refuse(base, f"the longest stack has {len(stack)} blocks, {needed} are needed to skip any")
        for position in stack:
            call = self.calls[position]
            if call.problem:
                return _refuse(base, f"{call.kind.__name__} in {call.owner} {call.problem}")
        middle = stack[self.probe_blocks : -1]
        for position in middle:
            if any(
                out is not None and role is None for out, role in zip(self.calls[position].outputs, roles[position])
            ):
                call = self.calls[position]
                return _refuse(
                    base, f"{call.kind.__name__} in {call.owner} returns something that is none of its inputs"
                )
        passes: dict[int, tuple[Key | None, ...] | Key] = {}
        for position in middle:
            role = roles[position]
            passes[position] = tuple(role) if self.calls[position].structured else role[0]  # type: ignore[assignment]
        stream = self._stream(stack, roles)
        if stream is None:
            return _refuse(base, "no output of the probe block continues one of its inputs")
        return Contract(
            sequence,
            tuple(stack),
            self.probe_blocks,
            passes,
            stream,
            self._residuals(stack),
            self.calls[stack[-1]].structured,
        )

    def _roles(self, number: int) -> list[Key | None]:
        """For each output of a call, the argument that it continues.

        First by what the next call of the same kind receives, by identity; then by shape, in the order of arguments.
        """
        call = self.calls[number]
        votes: dict[int, Key] = {}
        for later, links in enumerate(self.links):
            for key, (source, position) in links.items():
                if self.calls[later].kind is call.kind and self.calls[source].kind is call.kind:
                    votes.setdefault(position, key)
        roles: list[Key | None] = [None] * len(call.outputs)
        free = list(call.inputs)
        for prefer_votes in (True, False):
            for p, out in enumerate(call.outputs):
                if out is None or roles[p] is not None:
                    continue
                fitting = [key for key in free if call.inputs[key].like(out)]
                choice = votes.get(p) if prefer_votes else next(iter(fitting), None)
                if choice in fitting:
                    roles[p] = choice
                    free.remove(choice)
        return roles

    def _chains(self, roles: list[list[Key | None]]) -> Iterator[list[int]]:
        """Runs of calls in which each one continues what an earlier one of the run produced."""
        left = list(range(len(self.calls)))
        while left:
            chain = left[:1]
            for number in left[1:]:
                if self._continues(number, chain, roles[number]):
                    chain.append(number)
                elif self.calls[number].owner == self.calls[chain[-1]].owner or not self._returns_later(number, chain):
                    break  # anything else is a side call between two blocks of the run: a run of its own, perhaps
            yield chain
            left = [number for number in left if number not in chain]

    def _returns_later(self, number: int, chain: list[int]) -> bool:
        """True where a later call belongs to a list that the run has already been through."""
        owners = {self.calls[p].owner for p in chain}
        return any(call.owner in owners for call in self.calls[number + 1 :])

    def _continues(self, number: int, chain: list[int], roles: list[Key | None]) -> bool:
        call, last = self.calls[number], self.calls[chain[-1]]
        carried = [key for key in roles if key is not None]
        if any(key in self.links[number] and self.links[number][key][0] in chain for key in carried):
            return True
        produced = [out for out in last.outputs if out is not None]
        if call.owner in {self.calls[p].owner for p in chain}:
            # Something was added to, cut from or joined with the stream between two blocks of one list.
            return any(_same_size(call.inputs[key], out) for key in carried for out in produced)
        joined = sum(out.shape.numel() for out in produced)
        return any(
            call.inputs[key].shape.numel() == joined
            and (len(produced) > 1 or call.inputs[key].shape != produced[0].shape)
            for key in carried
        )

    def _stream(self, stack: list[int], roles: list[list[Key | None]]) -> tuple[int, Key] | None:
        """The largest output of the last probe block that continues an argument of the head."""
        head, end = stack[0], stack[self.probe_blocks - 1]
        best: tuple[int, Key] | None = None
        size = -1
        for position, out in enumerate(self.calls[end].outputs):
            role = roles[head][position] if position < len(roles[head]) else None
            if out is None or role is None or not self.calls[head].inputs[role].like(out):
                continue
            if out.shape.numel() > size:
                best, size = (position, role), out.shape.numel()
        return best

    def _residuals(self, stack: list[int]) -> tuple[int | None, ...]:
        head, tail = self.calls[stack[self.probe_blocks - 1]], self.calls[stack[-1]]
        if self.written_between or head.structured != tail.structured:
            return tuple(None for _ in tail.outputs)
        sources: list[int | None] = []
        for position, out in enumerate(tail.outputs):
            before = head.outputs[position] if position < len(head.outputs) else None
            sources.append(position if out is not None and before is not None and before.like(out) else None)
        return tuple(sources)


def _same_size(a: _Seen, b: _Seen) -> bool:
    return a.shape.numel() == b.shape.numel() and a.shape[-1] == b.shape[-1]


def _refuse(contract: Contract, reason: str) -> Contract:
    return Contract(contract.sequence, refusal=reason)


def _is_mutable(value: Any) -> bool:
    return isinstance(value, (dict, list)) or (
        hasattr(value, "__dict__") and not isinstance(value, (Tensor, torch.nn.Module, type)) and not callable(value)
    )


def _fingerprint(value: Any) -> tuple[Any, ...]:
    """What a mutable argument holds, two levels deep, by identity: tells whether a block wrote into it."""

    def shallow(item: Any) -> tuple[Any, ...]:
        if isinstance(item, dict):
            return tuple((key, id(entry)) for key, entry in item.items())
        if isinstance(item, list):
            return tuple(id(entry) for entry in item)
        return tuple((key, id(entry)) for key, entry in vars(item).items()) if _is_mutable(item) else ()

    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else vars(value).values()
    return (shallow(value), *(shallow(entry) for entry in entries))


def shape_key(value: Any) -> Any:
    """What the anchors of a call depend on: the shapes, dtypes and devices of its tensors, and where it has none."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device.type, value.device.index)
    if isinstance(value, Mapping):
        return tuple((key, shape_key(item)) for key, item in sorted(value.items(), key=lambda pair: str(pair[0])))
    if isinstance(value, (tuple, list)):
        return tuple(shape_key(item) for item in value)
    return value if isinstance(value, (bool, str)) or value is None else type(value).__name__
