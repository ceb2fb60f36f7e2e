"""The weights that one rank holds, as amounts: how large, trained or not, and who holds the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor, fx

from moec import ir
from moec.cost.reading.value import Sizes
from moec.cost.symbols import symbol
from moec.ir import region_of
from moec.ir.mesh import WORLD, Mesh
from moec.ir.placement import Layout, Placement, Split
from moec.runtime.ops.work import Amount


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer on one rank, held alike along the axis `holders`.

    `group`: the parameters that one call of the optimizer updates together (as `moec.runtime.optimizer` cuts
    them: experts or not, decayed or not, by holders and dtype); None where nothing is updated.
    """

    name: str
    elements: Amount
    dtype: torch.dtype
    holders: str
    group: tuple[bool, bool, str, str] | None = None

    @property
    def bytes(self) -> Amount:
        """All of it."""
        return self.dtype.itemsize * self.elements


@dataclass(frozen=True)
class Group:
    """Parameters that are flattened, reduced and updated together, by ranks of `axis`; see
    `moec.runtime.shards`."""

    weights: tuple[Weight, ...]
    axis: str
    mesh: Mesh

    @property
    def name(self) -> str:
        """`dense/decay along data`."""
        expert, decays = (self.weights[0].group or (False, False))[:2]
        what = f"{'expert' if expert else 'dense'}/{'decay' if decays else 'no_decay'}"
        return f"{what} along {self.axis}"

    @property
    def dtype(self) -> torch.dtype:
        """Of all parameters."""
        return self.weights[0].dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def is_dealt(self) -> bool:
        """Whether several ranks share the work; else each parameter is updated as it is."""
        return self.mesh.axes()[self.axis] > 1

    @property
    def elements(self) -> Amount:
        """Of all parameters."""
        return sympy.Add(*(weight.elements for weight in self.weights))

    @property
    def bytes(self) -> Amount:
        """Of all parameters."""
        return self.itemsize * self.elements

    @property
    def stretch(self) -> Amount:
        """The bytes that this rank updates."""
        if not self.is_dealt:
            return self.bytes
        return self.itemsize * sympy.ceiling(self.elements / symbol(self.axis))

    @property
    def flat(self) -> Amount:
        """The bytes of one flat copy: a stretch for each rank."""
        return symbol(self.axis) * self.stretch if self.is_dealt else self.bytes

    @property
    def updated(self) -> int:
        """How many tensors this rank updates."""
        return 1 if self.is_dealt else len(self.weights)


@dataclass(frozen=True)
class Weights:
    """All that one rank of `mesh` holds."""

    parameters: tuple[Weight, ...]
    buffers: tuple[Weight, ...]
    mesh: Mesh

    @classmethod
    def of(cls, program: ir.Program, rank: int = 0) -> Weights:
        """Those of `program` (of one process, or of any one rank), as the rank `rank` holds them."""
        layout = program.layout or Layout(Mesh())
        places, root = layout.mesh.coordinates(rank), program.graph
        experts = program.expert_parameter_names()
        parameters = tuple(
            _weight(name, value, layout, places, in_region(root, name), program._public(name) in experts)
            for name, value in root.named_parameters()
        )
        buffers = tuple(
            _weight(name, value, layout, places, in_region(root, name), None)
            for name, value in root.named_buffers()
        )
        return cls(parameters, buffers, layout.mesh)

    @property
    def groups(self) -> tuple[Group, ...]:
        """What is updated, in the order in which it is."""
        found: dict[tuple[bool, bool, str, str], list[Weight]] = {}
        for weight in self.parameters:
            if weight.group is not None:
                found.setdefault(weight.group, []).append(weight)
        ordered = sorted(found.items(), key=lambda item: item[0][:2])
        return tuple(Group(tuple(members), key[2], self.mesh) for key, members in ordered)


def _weight(
    name: str, value: Tensor, layout: Layout, coordinates: Mapping[str, int], even: bool, expert: bool | None
) -> Weight:
    """`expert`: whether a parameter has an axis of experts; None for a buffer."""
    placement = layout.of(name)
    shape = tuple(layout.shapes.get(name, value.shape)) if placement.splits else tuple(value.shape)
    holders = placement.holders if layout.mesh.world > 1 else WORLD
    group = None
    if expert is not None and value.requires_grad:
        group = (expert, value.dim() - expert >= 2, holders, str(value.dtype))
    sizes = weight_sizes(shape, placement, coordinates, even)
    elements = math.prod(sizes, start=sympy.Integer(1))
    return Weight(name, elements, value.dtype, holders, group)


def weight_sizes(shape: Sequence[int], placement: Placement, places: Mapping[str, int], even: bool) -> Sizes:
    """The part of a weight of `shape` on the rank at `places` of the axes.

    `even`: every rank's part is equally long, as those of all weights in regions are; at the root a
    vocabulary may be dealt out to ranks that it does not divide by.
    """
    splits = {split.dim: split for split in placement.splits}
    return tuple(
        _length(splits[dim], places[splits[dim].axis], even) if dim in splits else sympy.Integer(size)
        for dim, size in enumerate(shape)
    )


def _length(split: Split, place: int, even: bool) -> sympy.Expr:
    """The length of a dim that is dealt out, cut as `torch.chunk` cuts."""
    ranks, whole = symbol(split.axis), sympy.Integer(sum(split.blocks))
    if even:
        return whole / ranks
    longest = sympy.ceiling(whole / ranks)
    return longest if place == 0 else sympy.Max(0, sympy.Min(longest, whole - place * longest))


def in_region(root: fx.GraphModule, name: str) -> bool:
    """Whether the weight of this structural name belongs to a region of the graph."""
    child = getattr(root, name.partition(".")[0], None)
    return isinstance(child, fx.GraphModule) and region_of(child) is not None
