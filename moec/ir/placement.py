"""Which part of a parameter a rank holds, and which ranks hold the same part.

    ffn_3.up.weight    [384, 96]     dim 0 over tensor                  held alike along data
    moe_3.up.weight    [8, 384, 96]  dim 0 over expert_4                held alike along expert_data_4
    attention_0.qkv    [288, 96]     dim 0 over tensor, in 3 blocks     (q, k and v are dealt out one by one)

**The one rule of gradients.** The objective of a job is the sum of the objectives of its ranks. Every
collective of a partitioned graph has its exact transpose as backward, so the gradient of a parameter is the
*sum* of what `backward()` leaves on the ranks of its `holders` axis, with no further factor: not the size of
an axis, not the expert degree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .mesh import WORLD, Mesh


@dataclass(frozen=True)
class Split:
    """Dim `dim` is dealt out to the `ranks` ranks of `axis`: each of `blocks` (lengths that add up to the
    dim) is cut into that many stretches, as `torch.chunk` cuts, and rank i gets the i-th of each."""

    dim: int
    axis: str
    ranks: int
    blocks: tuple[int, ...]

    def spans(self, coordinate: int) -> list[tuple[int, int]]:
        """The stretches [start, stop) of the whole dim that the rank at `coordinate` holds, in order."""
        found, start = [], 0
        for length in self.blocks:
            step = -(-length // self.ranks)
            low, high = min(coordinate * step, length), min((coordinate + 1) * step, length)
            if high > low:
                found.append((start + low, start + high))
            start += length
        return found

    def size(self, coordinate: int) -> int:
        """The length of the dim on the rank at `coordinate`."""
        return sum(stop - start for start, stop in self.spans(coordinate))

    def __str__(self) -> str:
        blocks = f", in {len(self.blocks)} blocks" if len(self.blocks) > 1 else ""
        return f"dim {self.dim} over {self.axis}{blocks}"


@dataclass(frozen=True)
class Piece:
    """A box of a parameter: `size` elements at `start` of the local tensor and at `whole` of the whole."""

    start: tuple[int, ...]
    whole: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """How a parameter lies on the mesh: at most one split per dim, each over another axis.

    `holders`: the axis of ranks that hold the same values, along which gradients are summed.
    """

    splits: tuple[Split, ...] = ()
    holders: str = WORLD

    def local(self, whole: Tensor, coordinates: Mapping[str, int]) -> Tensor:
        """The part of `whole` that the rank at `coordinates` (axis → place) holds; a view where it can be."""
        part = whole
        for split in self.splits:
            spans = split.spans(coordinates[split.axis])
            parts = [part.narrow(split.dim, start, stop - start) for start, stop in spans]
            empty = part.narrow(split.dim, 0, 0)
            part = parts[0] if len(parts) == 1 else torch.cat(parts, split.dim) if parts else empty
        return part

    def local_shape(self, shape: Sequence[int], coordinates: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the part of a parameter of `shape`."""
        sizes = {split.dim: split.size(coordinates[split.axis]) for split in self.splits}
        return tuple(sizes.get(dim, size) for dim, size in enumerate(shape))

    def pieces(self, shape: Sequence[int], coordinates: Mapping[str, int]) -> Iterator[Piece]:
        """The boxes that the local part is made of: one, or one a block."""
        spans = {split.dim: split.spans(coordinates[split.axis]) for split in self.splits}
        along = [spans.get(dim, [(0, size)]) for dim, size in enumerate(shape)]
        starts = [
            list(itertools.accumulate((stop - start for start, stop in dim[:-1]), initial=0)) for dim in along
        ]
        for chosen in itertools.product(*(range(len(dim)) for dim in along)):
            box = [along[dim][index] for dim, index in enumerate(chosen)]
            yield Piece(
                tuple(starts[dim][index] for dim, index in enumerate(chosen)),
                tuple(start for start, _ in box),
                tuple(stop - start for start, stop in box),
            )

    def whole(self, shape: Sequence[int], parts: Sequence[tuple[Mapping[str, int], Tensor]]) -> Tensor:
        """The parameter of `shape` put together from (coordinates, local part) of enough ranks."""
        made = parts[0][1].new_empty(tuple(shape))
        for coordinates, part in parts:
            for piece in self.pieces(shape, coordinates):
                box = tuple(slice(at, at + n) for at, n in zip(piece.whole, piece.size, strict=True))
                local = tuple(slice(at, at + n) for at, n in zip(piece.start, piece.size, strict=True))
                made[box] = part[local]
        return made

    def named(self, mesh: Mesh) -> Placement:
        """The same on the axes as `mesh` names them."""
        splits = tuple(replace(split, axis=mesh.axis(split.axis)) for split in self.splits)
        return Placement(splits, mesh.axis(self.holders))

    def to_json(self) -> dict[str, Any]:
        """As plain data; `of_json` reads it back."""
        splits = [[s.dim, s.axis, s.ranks, list(s.blocks)] for s in self.splits]
        return {"splits": splits, "holders": self.holders}

    @classmethod
    def of_json(cls, record: Mapping[str, Any]) -> Placement:
        """The placement that `to_json` wrote."""
        splits = tuple(
            Split(dim, axis, ranks, tuple(blocks)) for dim, axis, ranks, blocks in record["splits"]
        )
        return cls(splits, record["holders"])

    def __str__(self) -> str:
        where = " · ".join(map(str, self.splits)) or "whole on every rank"
        return where if self.holders == WORLD else f"{where}; held alike along {self.holders}"


@dataclass(frozen=True)
class Layout:
    """The mesh of a program and where each of its weights lies (structural name → `Placement`).

    `shapes`: the whole shape of every weight that is split. A weight that is not listed is whole everywhere.
    """

    mesh: Mesh
    placements: Mapping[str, Placement] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def of(self, name: str) -> Placement:
        """The placement of the weight with this structural name."""
        return self.placements.get(name, Placement())

    def named(self, name: str) -> Layout:
        """The same on a mesh of the name `name`."""
        mesh = self.mesh.named(name)
        return replace(
            self, mesh=mesh, placements={key: one.named(mesh) for key, one in self.placements.items()}
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data; `of_json` reads it back."""
        return {
            "mesh": self.mesh.to_json(),
            "placements": {name: placement.to_json() for name, placement in self.placements.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

    @classmethod
    def of_json(cls, record: Mapping[str, Any]) -> Layout:
        """The layout that `to_json` wrote."""
        placements = {name: Placement.of_json(row) for name, row in record["placements"].items()}
        shapes = {name: tuple(shape) for name, shape in record["shapes"].items()}
        return cls(Mesh.of_json(record["mesh"]), placements, shapes)
