"""What there is to try: every way to arrange ranks that a program allows.

Pure arithmetic over what a program allows (`Space`); nothing is lowered.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from moec.errors import PlanError
from moec.ir.mesh import ExpertAxes, Mesh
from moec.passes.arrange_ranks import data_size, spread, way_of_rows
from moec.plan import Parallel
from moec.plan.fields import AllToAll

EXCHANGES = ("flat", "hierarchical", "coordinated", "auto")
"""Ways of the rows, plainest first: of those that come to the same, the first is taken."""
assert sorted(EXCHANGES) == sorted(get_args(AllToAll))


@dataclass(frozen=True)
class ExpertLayer:
    """One expert layer: its name, its number of `experts`, and into how many slices each of them is cut when
    the plan asks for so many (`ways`); numbers that are not there cannot be had. `bytes`: of all experts."""

    name: str
    experts: int
    ways: Mapping[int, int] = field(default_factory=lambda: {1: 1})
    bytes: int = 0

    def axes(self, parallel: Parallel, world: int) -> ExpertAxes:
        """The axes it gets on `world` ranks."""
        return spread(self.experts, parallel.expert, self.ways[parallel.slice], world)


@dataclass(frozen=True)
class Space:
    """What an arrangement has to respect. `world`: ranks; `heads`: most tensor ranks, 0 for any number;
    `layers`: the expert layers; `given`: what the plan says of the ranks, `fixed`: what of that stays."""

    world: int
    layers: tuple[ExpertLayer, ...] = ()
    heads: int = 0
    given: Parallel = field(default_factory=Parallel)
    fixed: Mapping[str, Any] = field(default_factory=dict)


def arrangements(space: Space) -> list[Parallel]:
    """Every arrangement of `space`, each told once: those that come to the same are told by the plainest.

    Raises `PlanError` where what is fixed does not fit the ranks.
    """
    _require_fitting(space)
    found: dict[Hashable, Parallel] = {}
    for parallel in _all(space):
        found.setdefault(effect(space, parallel), parallel)
    return list(found.values())


def mesh_of(space: Space, parallel: Parallel) -> Mesh:
    """The mesh of an arrangement, as `arrange_ranks` makes it."""
    layers = tuple((layer.name, layer.axes(parallel, space.world)) for layer in space.layers)
    return Mesh(space.world // parallel.tensor, parallel.tensor, parallel.node, layers)


def ways_of_rows(space: Space, parallel: Parallel) -> list[tuple[bool, bool]]:
    """For each expert layer: whether tensor ranks share its tokens, and whether rows take two steps."""
    mesh = mesh_of(space, parallel)
    return [way_of_rows(mesh, axes, parallel) for _, axes in mesh.layers]


def effect(space: Space, parallel: Parallel) -> Hashable:
    """What two arrangements have in common that come to the same program."""
    return mesh_of(space, parallel), tuple(ways_of_rows(space, parallel))


def least_bytes(space: Space, parallel: Parallel) -> int:
    """Bytes of experts that a rank holds at least, known before anything is lowered: no part of an expert is
    smaller than a slice of it."""
    axes = [(layer.bytes, layer.axes(parallel, space.world)) for layer in space.layers]
    return sum(held // (one.expert * one.slice) for held, one in axes)


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _all(space: Space) -> Iterator[Parallel]:
    for tensor in _tensors(space):
        for ways in _slices(space):
            for expert in _experts(space, ways):
                for kind in _choose(space, "all_to_all", EXCHANGES if space.layers else EXCHANGES[:1]):
                    changes = {"tensor": tensor, "slice": ways, "expert": expert, "all_to_all": kind}
                    yield space.given.model_copy(update={**changes, "data": space.world // tensor})


def _choose(space: Space, name: str, free: Sequence[Any]) -> Sequence[Any]:
    return [space.fixed[name]] if name in space.fixed else free


def _tensors(space: Space) -> Sequence[int]:
    if space.fixed.get("data", "auto") != "auto":
        return [space.world // space.fixed["data"]]
    free = [d for d in divisors(space.world) if not space.heads or d <= space.heads]
    return _choose(space, "tensor", free)


def _slices(space: Space) -> Sequence[int]:
    if not space.layers:
        return [1]
    free = [
        ways
        for ways in divisors(space.world)
        if all(ways in layer.ways for layer in space.layers)
        and (ways == 1 or any(layer.ways[ways] == ways for layer in space.layers))
    ]
    return _choose(space, "slice", free)


def _experts(space: Space, ways: int) -> Sequence[int]:
    if not space.layers:
        return [1]
    ranks = space.world // ways
    free = {d for layer in space.layers for d in divisors(layer.experts) if ranks % d == 0}
    return _choose(space, "expert", sorted(free))


def _require_fitting(space: Space) -> None:
    """Refuse fixed axes that the ranks do not have room for, or cannot be divided by."""
    wanted = {name: space.fixed[name] for name in ("tensor", "slice", "data") if name in space.fixed}
    for name, count in wanted.items():
        if count != "auto" and (count > space.world or space.world % count):
            fitting = ", ".join(map(str, divisors(space.world)))
            needed = f"a number that divides the ranks of the cluster: {fitting}"
            raise PlanError(f"[parallel] {name}", f"{name} = {count} on {space.world} ranks", needed)
    if wanted.get("data", "auto") != "auto":
        wanted.setdefault("tensor", space.world // wanted["data"])
    data_size(space.given.model_copy(update=wanted), space.world)
    ways = space.fixed.get("slice", 1)
    for layer in space.layers:
        if ways not in layer.ways:
            having = ", ".join(map(str, sorted(layer.ways)))
            raise PlanError("[parallel] slice", f"slice = {ways} of {layer.name}", f"one of {having}")
    _require_heads(space)


def _require_heads(space: Space) -> None:
    tensor = space.fixed.get("tensor", 1)
    if space.fixed.get("data", "auto") != "auto":
        tensor = space.world // space.fixed["data"]
    if space.heads and tensor > space.heads:
        found = f"tensor = {tensor} for {space.heads} attention heads"
        raise PlanError("[parallel] tensor", found, f"at most {space.heads}")
