"""Swap the weights of a graph for the parts that one rank holds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from .graphs import named_weights
from .placement import Layout, Placement


def hold_parts(root: fx.GraphModule, layout: Layout, rank: int, names: set[str]) -> None:
    """Replace the weights `names` (structural, as in `named_weights`) of `root` by what `rank` holds, in
    place.

    Parts are copies, so the whole can be freed; a weight under several names stays one weight. Names whose
    placement has no split are left alone.
    """
    coordinates = layout.mesh.coordinates(rank)
    made: dict[int, Tensor] = {}
    for name, value in list(named_weights(root)):
        placement = layout.of(name)
        if name in names and placement.splits:
            if id(value) not in made:
                made[id(value)] = _part(value, placement, coordinates)
            owner, _, leaf = name.rpartition(".")
            swap(root.get_submodule(owner), leaf, made[id(value)])


def _part(value: Tensor, placement: Placement, coordinates: Mapping[str, int]) -> Tensor:
    part = placement.local(value.detach(), coordinates).clone()
    return nn.Parameter(part, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else part


def swap(owner: nn.Module, leaf: str, part: Tensor) -> None:
    """Let `owner` hold `part` as its parameter or buffer `leaf`."""
    table = owner._parameters if leaf in owner._parameters else owner._buffers
    table[leaf] = part  # type: ignore[assignment]


def own_weights(root: fx.GraphModule, shared_with: fx.GraphModule) -> None:
    """Copy every weight that `root` still shares with another graph, in place; tied ones stay tied."""
    foreign = {id(value) for _, value in named_weights(shared_with)}
    made: dict[int, Tensor] = {}
    for name, value in list(named_weights(root)):
        if id(value) in foreign:
            if id(value) not in made:
                made[id(value)] = _part(value, Placement(), {})
            owner, _, leaf = name.rpartition(".")
            swap(root.get_submodule(owner), leaf, made[id(value)])
