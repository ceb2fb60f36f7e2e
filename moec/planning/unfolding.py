"""The cost of all layers, written out from that of a folded program.

    folded:   before │ D │ M │ D │ M │ after            whole:   before │ D │ M │ D │ M │ D │ M │ … │ after

Operations of a block are repeated for every block it stands for. What an operation waits for is carried over:
an operation of its own block, one before all blocks, or those that made what the block before gives. After
the blocks stand the head and, in training, sums of loss terms, to which every expert layer adds its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moec.cost.operation import Operation
from moec.cost.rank.weights import Weight, Weights
from moec.cost.reading.read import Reading
from moec.cost.reading.value import Value

from .segments import Segments


def unfolded(
    reading: Reading, segments: Segments, stands_for: Sequence[int], numbers: Sequence[int]
) -> Reading:
    """What reading the whole would give; `stands_for[i]` is the block of the folded program that block i is
    like, `numbers[i]` the number that the regions of block i have."""
    writing = _Writing(reading.operations, segments)
    writing.copy(range(segments.starts[0]))
    for block, number in zip(stands_for, numbers, strict=True):
        writing.block(block, number)
    writing.tail(stands_for, numbers)
    inputs = [value for i, value in enumerate(reading.inputs) if segments.input_of.get(i) is None]
    for block in stands_for:
        inputs += [value for i, value in enumerate(reading.inputs) if segments.input_of.get(i) == block]
    return Reading(tuple(writing.written), tuple(inputs), _placed(reading.results, writing.place))


def unfolded_weights(weights: Weights, segments: Segments, stands_for: Sequence[int]) -> Weights:
    """All weights of a rank: those of a block once for every block it stands for, under names that differ."""
    return replace(
        weights,
        parameters=_repeated(weights.parameters, segments, stands_for),
        buffers=_repeated(weights.buffers, segments, stands_for),
    )


def _repeated(weights: Sequence[Weight], segments: Segments, stands_for: Sequence[int]) -> tuple[Weight, ...]:
    made = [weight for weight in weights if weight.name not in segments.weight_of]
    for number, block in enumerate(stands_for):
        own = [weight for weight in weights if segments.weight_of.get(weight.name) == block]
        made += [replace(weight, name=f"{number}: {weight.name}") for weight in own]
    return tuple(made)


def _placed(results: Any, place: Mapping[int, int]) -> Any:
    """The results of a graph, made by the operations where they stand now."""
    if isinstance(results, Mapping):
        return {name: _placed(value, place) for name, value in results.items()}
    if isinstance(results, list | tuple):
        return type(results)(_placed(value, place) for value in results)
    if not isinstance(results, Value):
        return results
    return replace(results, made=frozenset(place[index] for index in results.made))


def term_layers(operations: Sequence[Operation], segments: Segments) -> dict[int, int]:
    """Operations after the blocks that add up loss terms → the last block whose term they read.

    What follows from the logits is none of them.
    """
    end, found = segments.starts[-1], dict[int, int]()
    stream = set(segments.exits[-1])
    for index in range(end, len(operations)):
        after = operations[index].after
        of = [found[old] if old in found else segments.block(old) for old in after]
        told = [block for block in of if block is not None]
        if not stream.isdisjoint(after):
            stream.add(index)
        elif told:
            found[index] = max(told)
    return found


@dataclass
class _Writing:
    """What was written so far. `place`: operation of the folded program → where it stands in the whole now;
    `at[i]`: the same for the operations of block i of the whole."""

    operations: Sequence[Operation]
    segments: Segments
    written: list[Operation] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)
    at: list[dict[int, int]] = field(default_factory=list)
    exits: tuple[int, ...] = ()

    def copy(self, indices: Iterable[int], old: int | None = None, number: int | None = None) -> None:
        """Write these operations here; the number `old` in their names becomes `number`."""
        for index in indices:
            one = self.operations[index]
            after = tuple(sorted({new for before in one.after for new in self._now(index, before)}))
            self.place[index] = len(self.written)
            started = None if one.started is None else self.place[one.started]
            moved = replace(one, after=after, started=started)
            self.written.append(moved if number is None or old is None else _renamed(moved, old, number))

    def _now(self, index: int, before: int) -> tuple[int, ...]:
        """Where an operation that `index` waits for stands now; those of another block: what that gives."""
        block = self.segments.block(before)
        inside = (
            block is None or block == self.segments.block(index) or before not in self.segments.exits[block]
        )
        return (self.place[before],) if inside else self.exits

    def block(self, block: int, number: int) -> None:
        """Write block `block` once more, as number `number`."""
        start, end = self.segments.starts[block : block + 2]
        self.copy(range(start, end), self.segments.numbers[block], number)
        self.at.append({index: self.place[index] for index in range(start, end)})
        self.exits = tuple(self.place[index] for index in self.segments.exits[block])

    def tail(self, stands_for: Sequence[int], numbers: Sequence[int]) -> None:
        """Write what follows the blocks: the terms of the first expert layer and the head as they are, those
        of the others once for each layer they stand for."""
        terms = term_layers(self.operations, self.segments)
        first = min(terms.values(), default=None)
        runs = {block: [i for i, of in terms.items() if of == block] for block in sorted(set(terms.values()))}
        ends = {block: self._ends(run, terms, first) for block, run in runs.items()}
        written = False
        for index in range(self.segments.starts[-1], len(self.operations)):
            if terms.get(index, first) == first:
                self.copy([index])
            elif not written:
                written = True
                for layer, block in enumerate(stands_for):
                    if block in runs and block != first:
                        self.place |= self.at[layer]
                        self.copy(runs[block], self.segments.numbers[block], numbers[layer])
                        self._end_like(ends, block)

    def _ends(self, run: Sequence[int], terms: Mapping[int, int], first: int | None) -> list[int]:
        """The sums that a layer's terms end in: of the first layer what others add to, of the others what
        nothing else of the same layer reads."""
        own = [index for index in run if terms[index] == first]
        readers = [index for index in terms if index not in run] if own else run
        read = {before for index in readers for before in self.operations[index].after}
        return [index for index in run if (index in read) == bool(own)]

    def _end_like(self, ends: Mapping[int, Sequence[int]], block: int) -> None:
        """Whoever reads the sums up to any of the layers reads from now on those up to this one."""
        for others in ends.values():
            self.place |= {other: self.place[mine] for other, mine in zip(others, ends[block], strict=True)}


def _renamed(one: Operation, old: int, number: int) -> Operation:
    region = re.sub(rf"_{old}$", f"_{number}", one.region)
    if region:
        return replace(one, region=region, layer=number, name=f"{region}.{one.name.partition('.')[2]}")
    return replace(one, name=re.sub(rf"_{old}(?=b?$)", f"_{number}", one.name))
