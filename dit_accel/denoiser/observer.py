"""Observer: watches the calls of one computed forward, by identity and shape, and writes the contract."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.cache.scope import Range
from dit_accel.denoiser.contract import Contract, Key, outputs_of
from dit_accel.diffusers_bridge import tensor_version


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

    def repeats_to(self, other: _Seen) -> bool:
        """True for one row that the other repeats for a batch."""
        one_row = self.shape[:1] == (1,) and self.shape[1:] == other.shape[1:] and len(self.shape) >= 3
        return one_row and self.dtype == other.dtype


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

    def __init__(
        self,
        probe_blocks: int,
        flops_so_far: Callable[[], int],
        ranges: Callable[[int, float], tuple[Range, ...]] | None = None,
    ):
        """ranges: (blocks of the stack, share of the run that is over) -> ranges that may be skipped; default: all
        behind the probe as one."""
        self.probe_blocks, self.flops_so_far = max(probe_blocks, 1), flops_so_far
        self.ranges = ranges or (lambda places, progress: ((probe_blocks, places - 1),))
        self.layers: list[tuple[int, str, str, bool, int]] = []  # call, name, kind, may be skipped, FLOPs
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

    def layer(self, name: str, kind: str, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Run one layer inside the block that is running, and note whether its output could stand in for it."""
        start, versions = self.flops_so_far(), [tensor_version(v) for v in [*args, *kwargs.values()] if _is_float(v)]
        result = run()
        given = [value for value in [*args, *kwargs.values()] if _is_float(value)]
        made = outputs_of(result)
        fits = all(isinstance(v, Tensor) or v is None for v in made) and any(isinstance(v, Tensor) for v in made)
        if kind == "mlp":  # a norm with an embedding takes two tensors, an embedding itself has no tokens
            fits = fits and len(given) == 1 and given[0].ndim >= 3 and isinstance(result, Tensor) and result.ndim >= 3
        fits = fits and versions == [tensor_version(value) for value in given]
        self.layers.append((len(self.calls), name, kind, fits, self.flops_so_far() - start))
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
        possible = self._skippable(len(stack))
        needed = self.probe_blocks + 2
        if len(stack) < needed:
            return _refuse(base, f"the longest stack has {len(stack)} blocks, {needed} are needed to skip any")
        for position in stack:
            call = self.calls[position]
            if call.problem:
                return _refuse(base, f"{call.kind.__name__} in {call.owner} {call.problem}")
        for position in sorted({stack[place] for one in possible for place in range(one[0], one[1])}):
            if any(
                out is not None and role is None for out, role in zip(self.calls[position].outputs, roles[position])
            ):
                call = self.calls[position]
                return _refuse(
                    base, f"{call.kind.__name__} in {call.owner} returns something that is none of its inputs"
                )
        stream = self._stream(stack, roles)
        if stream is None:
            return _refuse(base, "no output of the probe block continues one of its inputs")
        places = {position: place for place, position in enumerate(stack)}
        return Contract(
            sequence,
            tuple(stack),
            self.probe_blocks,
            lambda progress: self.ranges(len(stack), progress),
            {position: tuple(roles[position]) for position in stack},
            frozenset(position for position in stack if self.calls[position].structured),
            stream,
            tuple(self.calls[position].owner for position in stack),
            {one: self._residuals(stack, one, roles) for one in possible},
            self._layers(places),
            {position: found for position in stack if (found := self._repeated(position, roles[position]))},
        )

    def _residuals(self, stack: list[int], one: Range, roles: list[list[Key | None]]) -> tuple[bool, ...]:
        """Which outputs of a range's last block can be told as residuals to what goes into the range: the outputs of
        the block before it, or in front of the first the inputs that it continues."""
        first, tail = stack[one[0]], self.calls[stack[one[1]]]
        if one[0]:
            head = self.calls[stack[one[0] - 1]]
            before, structured = head.outputs, head.structured
        else:
            head = self.calls[first]
            before = [None if key is None else head.inputs[key] for key in roles[first]]
            structured = head.structured
        if self.written_between or structured != tail.structured:
            return tuple(False for _ in tail.outputs)
        pairs = [(out, before[number] if number < len(before) else None) for number, out in enumerate(tail.outputs)]
        return tuple(
            out is not None and source is not None and (source.like(out) or source.repeats_to(out))
            for out, source in pairs
        )

    def _repeated(self, position: int, roles: list[Key | None]) -> tuple[tuple[int, int], ...]:
        """Outputs that repeat one row of what they continue, with their rows: one text for several pictures."""
        call = self.calls[position]
        pairs = enumerate(zip(call.outputs, roles))
        return tuple(
            (number, out.shape[0])
            for number, (out, key) in pairs
            if out is not None and key is not None and not call.inputs[key].like(out)
        )

    def _skippable(self, places: int) -> set[Range]:
        return {one for progress in (0.0, 1.0) for one in self.ranges(places, progress)}

    def _layers(self, places: Mapping[int, int]) -> dict[tuple[int, str], str]:
        """Layers that may be skipped: those that ran once in their block, and whose output can stand in for them."""
        count = Counter((call, name) for call, name, *_ in self.layers)
        return {
            (places[call], name): kind
            for call, name, kind, fits, _ in self.layers
            if fits and call in places and count[call, name] == 1
        }

    def layer_flops(self, contract: Contract) -> dict[tuple[int, str], int]:
        """FLOPs of the layers that may be skipped."""
        flops = {(contract.places.get(call), name): flops for call, name, _, _, flops in self.layers}
        return {key: flops[key] for key in contract.layers}

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
        for prefer_votes, like in ((True, _Seen.like), (False, _Seen.like), (False, _Seen.repeats_to)):
            for p, out in enumerate(call.outputs):
                if out is None or roles[p] is not None:
                    continue
                fitting = [key for key in free if like(call.inputs[key], out)]
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


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
