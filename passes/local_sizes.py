"""The sizes a call spells, when it works on a rank's part of its channels instead of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir.patterns import tensor

from .carry_ids import MixedError
from .channels import Channels, arguments_of

aten = torch.ops.aten

Box = list[Tensor]
"""The indices along each dim at which a part of a value lies, i64 [n] each."""

# The argument that spells the sizes of the result.
SIZES: dict[Any, str] = {
    aten.reshape.default: "shape", aten.unflatten.int: "sizes", aten.expand.default: "size",
    aten.broadcast_to.default: "size",
}  # fmt: skip


@dataclass(frozen=True)
class Fraction:
    """A free size divided by a number of ranks."""

    size: fx.Node
    ranks: int


def local_arguments(
    node: fx.Node, channels: Channels, sources: Mapping[fx.Node, Any], boxes: Any, ranks: int
) -> dict[str, Any]:
    """The arguments of `node` (by the schema's names) that are other for a rank's part.

    `sources`: the boxes, rank by rank, of the values it reads; `boxes`: those of its result. Raises
    `MixedError`.
    """
    target = node.target
    if target in SIZES:
        return _sizes(node, channels, boxes[0])
    if target is aten.split.Tensor:
        return {"split_size": _lengths(node, boxes)[0]} if _lengths(node, boxes) else {}
    if target is aten.split_with_sizes.default:
        return {"split_sizes": _lengths(node, boxes)}
    if target is aten.slice.Tensor:
        (source,) = sources
        return _bounds(node, sources[source][0], channels.ids[source].shape)
    return {}


def given(node: fx.Node, name: str) -> Any:
    """The argument of a call, or its default."""
    named = arguments_of(node, lambda n: n)
    if name in named:
        return named[name]
    return next(a.default_value for a in node.target._schema.arguments if a.name == name)  # type: ignore[union-attr]


def _sizes(node: fx.Node, channels: Channels, box: Box) -> dict[str, Any]:
    name = SIZES[node.target]
    whole, sizes = channels.ids[node].shape, list(given(node, name))
    first = int(given(node, "dim")) if node.target is aten.unflatten.int else 0
    first += len(whole) - len(sizes) + 1 if first < 0 else 0
    local = [_size(size, whole[first + i], len(box[first + i])) for i, size in enumerate(sizes)]
    return {name: local} if local != sizes else {}


def _size(size: Any, whole: int, local: int) -> Any:
    if whole == local or size == -1:
        return size
    return Fraction(size, whole // local) if isinstance(size, fx.Node) else local


def _lengths(node: fx.Node, boxes: Sequence[list[Box]]) -> list[int]:
    dim = int(given(node, "dim"))
    return [len(item[0][dim]) for item in boxes]


def _bounds(node: fx.Node, box: Box, shape: Sequence[int]) -> dict[str, Any]:
    """The bounds of a slice, counted among the indices a rank has."""
    dim = int(given(node, "dim"))
    here, whole = box[dim].tolist(), shape[dim]
    if len(here) == whole:
        return {}
    value = tensor(node.args[0])
    bounds = [given(node, name) for name in ("start", "end", "step")]
    if value is None or not isinstance(value.shape[dim], int) or any(isinstance(b, fx.Node) for b in bounds):
        raise MixedError(f"`{node.name}` cuts its channels at a free size")
    chosen = set(range(whole)[slice(*bounds)])
    places = [place for place, index in enumerate(here) if index in chosen]
    if not places:
        raise MixedError(f"`{node.name}` takes the channels of some ranks only")
    step = places[1] - places[0] if len(places) > 1 else 1
    local = {"start": places[0], "end": places[-1] + 1, "step": step}
    if bounds[1] is None or bounds[1] >= whole:
        local["end"] = bounds[1]  # to the end, here as there
    return {name: value for name, value in local.items() if value != given(node, name)}
