"""What this rank holds of each weight, which other ranks hold the same, and which of them saves it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moec.ir.placement import Piece, Placement
from moec.runtime.ranks import Ranks
from moec.runtime.trainable import LocalTrainable, Trainable


@dataclass(frozen=True)
class Part:
    """`tensor` is a part of a tensor of `shape`: its boxes `pieces`. Not a copy."""

    tensor: Tensor
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Part:
        """A tensor that is all there."""
        shape = tuple(tensor.shape)
        return cls(tensor, shape, tuple(Placement().pieces(shape, {})))

    def box(self, piece: Piece) -> Tensor:
        """The elements of one of the pieces, a view."""
        return self.tensor[tuple(slice(at, at + n) for at, n in zip(piece.start, piece.size, strict=True))]


class Holding:
    """How this rank holds the weights of `program`, by their names in `named_parameters` and
    `named_buffers`."""

    def __init__(self, program: Trainable, ranks: Ranks) -> None:
        local = program if isinstance(program, LocalTrainable) and ranks.world > 1 else None
        self.ranks = ranks
        self._placements = dict(local.placements()) if local else {}
        self._shapes = dict(local.whole_shapes()) if local else {}
        self._coordinates = ranks.mesh.coordinates(ranks.rank)
        self._sizes = ranks.mesh.axes()
        names = [name for name, _ in program.named_parameters()] + [
            name for name, _ in program.named_buffers()
        ]
        self._turns = {name: turn for turn, name in enumerate(names)}

    def placement(self, name: str) -> Placement:
        """Where the weight lies on the mesh."""
        return self._placements.get(name, Placement())

    def holders(self, name: str) -> tuple[str, int, int]:
        """(axis, number, place of this rank) of the ranks that hold the same part of the weight."""
        axis = self.placement(name).holders
        return axis, self._sizes[axis], self._coordinates[axis]

    def part(self, name: str, tensor: Tensor) -> Part:
        """`tensor`, which lies on the mesh like the weight `name`, as the part of the whole that it is."""
        placement = self.placement(name)
        shape = tuple(self._shapes.get(name, tensor.shape)) if placement.splits else tuple(tensor.shape)
        return Part(tensor, shape, tuple(placement.pieces(shape, self._coordinates)))

    def is_first_part(self, name: str) -> bool:
        """Whether this rank's part of the weight is the first: what there is once for all parts goes with
        it."""
        return all(self._coordinates[split.axis] == 0 for split in self.placement(name).splits)

    def is_saved_here(self, name: str) -> bool:
        """Whether this rank is the one that saves its part of the weight; the holders take turns."""
        _, number, place = self.holders(name)
        return self._turns[name] % number == place
