"""How ranks are arranged once the letters of axes have numbers, and how their groups lie on nodes.

A program is lowered on one mesh; its cost is asked for at other numbers of ranks. What is free are `data`,
`tensor`, and `expert_…` and `slice_…` of every kind of expert layer; the others follow (`world` is data times
tensor, `expert_data_…` what is left of it, `…_inside` what a node holds).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from moec.errors import MeshError
from moec.ir.mesh import DATA, TENSOR, WORLD, ExpertAxes, Mesh


@dataclass(frozen=True)
class Spread:
    """How the groups of an axis lie on nodes: `ranks` of each, `fewest` and `most` of them that share a node,
    and the most `nodes` that one group touches."""

    ranks: int
    fewest: int
    most: int
    nodes: int

    @property
    def crosses(self) -> bool:
        """Whether any group leaves its node."""
        return self.nodes > 1


@dataclass(frozen=True)
class Arranged:
    """The mesh at other numbers of ranks; `names`: axis of the program → axis of this mesh."""

    mesh: Mesh
    names: tuple[tuple[str, str], ...]

    @property
    def numbers(self) -> dict[str, int]:
        """Ranks of every axis, by the name that the program has for it."""
        ranks = self.mesh.axes()
        return {axis: ranks[here] for axis, here in self.names}

    def spread(self, axis: str, per_node: int) -> Spread:
        """How the groups of `axis` lie on nodes of `per_node` neighbouring ranks."""
        return spread_of(self.mesh, dict(self.names)[axis], per_node)


def arranged(mesh: Mesh, letters: Mapping[str, int]) -> Arranged:
    """`mesh` with the axes among `letters` at their numbers.

    Raises `MeshError` where they do not multiply to one world, or a letter that follows is given otherwise.
    """
    own = mesh.axes()
    given = {name: int(number) for name, number in letters.items() if name in own}
    if all(own[name] == number for name, number in given.items()):
        return Arranged(mesh, tuple((axis, axis) for axis in own))
    bare = replace(mesh, name="", beside=())
    tensor = given.get(mesh.axis(TENSOR), mesh.tensor)
    data = given.get(mesh.axis(DATA), _of_world(given, mesh.data, tensor))
    factors = {axes: _expert_axes(mesh, axes, given, data * tensor) for axes in bare.expert_axes}
    layers = tuple((layer, factors[axes]) for layer, axes in bare.layers)
    made = Mesh(data, tensor, _node(mesh, given), layers, mesh.name)
    found = Arranged(made, tuple(_paired(mesh, made, factors)))
    _require_same(found.numbers, given)
    return found


def _of_world(given: Mapping[str, int], data: int, tensor: int) -> int:
    world = given.get(WORLD)
    if world is None:
        return data
    if world % tensor:
        raise MeshError("mesh", f"world {world}, tensor {tensor}", "a world that tensor divides")
    return world // tensor


def _expert_axes(mesh: Mesh, axes: ExpertAxes, given: Mapping[str, int], world: int) -> ExpertAxes:
    expert = given.get(mesh.axis(axes.expert_axis), axes.expert)
    slice_ = given.get(mesh.axis(axes.slice_axis), axes.slice)
    if world % (expert * slice_):
        found = f"{axes.expert_axis} = {expert} × {axes.slice_axis} = {slice_} on {world} ranks"
        raise MeshError("mesh", found, "numbers whose product divides the world (data × tensor)")
    return ExpertAxes(world // (expert * slice_), expert, slice_)


def _node(mesh: Mesh, given: Mapping[str, int]) -> int:
    """Ranks of a node: what the mesh has, or what letters of `…_inside` mean."""
    for axes in replace(mesh, name="", beside=()).expert_axes:
        inside = given.get(mesh.axis(axes.inside_axis))
        if inside is not None:
            return inside * given.get(mesh.axis(axes.slice_axis), axes.slice)
    return mesh.node


def _paired(old: Mesh, new: Mesh, factors: Mapping[ExpertAxes, ExpertAxes]) -> list[tuple[str, str]]:
    pairs = [(axis, axis) for axis in (WORLD, DATA, TENSOR)]
    for before, after in factors.items():
        for kind in ("slice", "expert", "data", "alike", "inside", "between"):
            pairs.append((getattr(before, f"{kind}_axis"), getattr(after, f"{kind}_axis")))
    return [(old.axis(before), new.axis(after)) for before, after in pairs]


def _require_same(numbers: Mapping[str, int], given: Mapping[str, int]) -> None:
    for axis, number in given.items():
        if axis in numbers and numbers[axis] != number:
            found = ", ".join(f"{name} = {value}" for name, value in given.items())
            raise MeshError("mesh", found, f"{axis} = {numbers[axis]}, as the others have it")


@functools.lru_cache(maxsize=4096)
def spread_of(mesh: Mesh, axis: str, per_node: int) -> Spread:
    """How the groups along `axis` lie on nodes of `per_node` neighbouring ranks."""
    ranks = mesh.axes()[axis]
    fewest, most, nodes, seen = ranks, 1, 1, set[int]()
    for rank in range(mesh.world):
        if rank in seen:
            continue
        group = mesh.group(axis, rank)
        seen.update(group)
        held = Counter(member // per_node for member in group)
        fewest, most = min(fewest, *held.values()), max(most, *held.values())
        nodes = max(nodes, len(held))
    return Spread(ranks, fewest, most, nodes)


def even_spread(ranks: int, per_node: int) -> Spread:
    """Of a group of neighbouring ranks that fills whole nodes, or a part of one."""
    inside = math.gcd(ranks, per_node) if ranks > per_node else ranks
    return Spread(ranks, inside, inside, ranks // inside)
