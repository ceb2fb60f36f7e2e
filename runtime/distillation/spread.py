"""How what is known of a batch lies on the ranks of a mesh, and who sends what to make it lie otherwise.

Legend: B sequences of the job's batch, S positions, W the last dim: words, which may be dealt out, or others,
which are whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from moec.ir.mesh import DATA, Mesh
from moec.ir.placement import Split
from moec.runtime.ranks import Ranks
from moec.runtime.trainable import LocalTrainable, Trainable

Span = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """Sequences [start, stop) and places [start, stop) of the last dim, as numbered in the whole."""

    rows: Span
    words: Span

    @property
    def size(self) -> int:
        """The number of (sequence, word) pairs."""
        return _length(self.rows) * _length(self.words)

    def meet(self, other: Box) -> Box:
        """What both have; of size 0 where that is nothing."""
        return Box(_meet(self.rows, other.rows), _meet(self.words, other.words))

    def inside(self, outer: Box) -> tuple[slice, slice]:
        """Where this box lies in a tensor that holds `outer`: its sequences, and its words."""
        return _shifted(self.rows, outer.rows[0]), _shifted(self.words, outer.words[0])


@dataclass(frozen=True)
class Spread:
    """Data rank d holds the d-th stretch of the sequences, as `tensor_split` cuts; `words` says how the last
    dim is dealt out to tensor ranks, None: it is whole on each."""

    mesh: Mesh
    words: Split | None = None

    @classmethod
    def of(cls, program: Trainable, ranks: Ranks) -> Spread:
        """How the logits of `program` lie, as its graph returns them, where each of `ranks` runs it on its
        stretch of the batch."""
        return cls(ranks.mesh, program.words if isinstance(program, LocalTrainable) else None)

    @property
    def undealt(self) -> Spread:
        """The same for what has the sequences alone in parts."""
        return Spread(self.mesh)

    def is_like(self, other: Spread) -> bool:
        """Whether every rank holds the same of any batch."""
        if (self.mesh.data, self.mesh.tensor) != (other.mesh.data, other.mesh.tensor):
            return False
        return all(self._words_of(rank) == other._words_of(rank) for rank in range(self.mesh.world))

    def box(self, rank: int, sequences: int, width: int) -> Box:
        """What `rank` holds of a value [sequences, …, width]."""
        ranks, place = self.mesh.data, self.mesh.coordinate(DATA, rank)
        share, rest = divmod(sequences, ranks)
        start = place * share + min(place, rest)
        return Box((start, start + share + (place < rest)), self._words_of(rank) or (0, width))

    def _words_of(self, rank: int) -> Span | None:
        """The words that `rank` holds; None: all of them."""
        if self.words is None:
            return None
        spans = self.words.spans(self.mesh.coordinate(self.words.axis, rank))
        return (spans[0][0], spans[-1][1]) if spans else (0, 0)


@dataclass(frozen=True)
class Parcels:
    """What `rank` sends and gets to bring a value [sequences, …, width] from `have` to `need`.

    Where several ranks hold what another one needs, one of them sends it: that one itself if it can, else
    they take turns.
    """

    have: Spread
    need: Spread
    rank: int
    sequences: int
    width: int
    _holders: dict[Box, list[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        holders: dict[Box, list[int]] = {}
        for rank in range(self.have.mesh.world):
            holders.setdefault(self.held(rank), []).append(rank)
        object.__setattr__(self, "_holders", holders)

    def held(self, rank: int) -> Box:
        """What `rank` has."""
        return self.have.box(rank, self.sequences, self.width)

    def needed(self, rank: int) -> Box:
        """What `rank` needs."""
        return self.need.box(rank, self.sequences, self.width)

    @cached_property
    def sent(self) -> list[Box]:
        """What this rank sends to each rank, itself included; a box may be empty."""
        return [self._sent(self.rank, target) for target in range(self.need.mesh.world)]

    @cached_property
    def received(self) -> list[Box]:
        """What this rank gets of each."""
        return [self._sent(source, self.rank) for source in range(self.have.mesh.world)]

    def travels(self) -> bool:
        """Whether anything goes from one rank to another, any of them: the same answer on every rank."""
        ranks = range(self.need.mesh.world)
        return any(self.needed(rank).meet(self.held(rank)).size < self.needed(rank).size for rank in ranks)

    def _sent(self, source: int, target: int) -> Box:
        box = self.held(source)
        holders = self._holders[box]
        sender = target if target in holders else holders[target % len(holders)]
        return box.meet(self.needed(target)) if sender == source else Box((0, 0), (0, 0))


def _length(span: Span) -> int:
    return span[1] - span[0]


def _meet(one: Span, other: Span) -> Span:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if stop > start else (0, 0)


def _shifted(span: Span, start: int) -> slice:
    return slice(span[0] - start, span[1] - start) if span[1] > span[0] else slice(0, 0)
