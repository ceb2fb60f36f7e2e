"""What each weight is for, told by what reads it and never by its name.

    linear(x, w, b), embedding(w, i)       a matrix, and a shift
    rms_norm(x, [D], w), x * w             a scale, which does nothing at 1
    rms_norm(x, [D], w + 1.0)              a scale, which does nothing at 0 (Gemma's norms)
    x + w, w of one dim                    a shift
    x + w[:, :S], w of several             a table, of positions
    router(x, w), route(scores, bias)      a router, a bias of the selection

A weight is followed through views, casts and additions of numbers, and into and out of regions.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir import Region, region_of
from moec.ir.graphs import graph_modules, weight_of
from moec.ir.patterns import argument, arguments_of, tensor

aten, experts = torch.ops.aten, torch.ops.moec

MOVES = {
    aten.t.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.expand.default,
    aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.to.dtype, aten._to_copy.default,
    aten.detach.default, aten.clone.default, aten.view_as.default, aten.expand_as.default,
}  # fmt: skip
PLACES: dict[tuple[Any, int], str] = {
    (aten.linear.default, 1): "matrix",
    (aten.linear.default, 2): "shift",
    (aten.matmul.default, 0): "matrix",
    (aten.matmul.default, 1): "matrix",
    (aten.embedding.default, 0): "matrix",
    (aten.layer_norm.default, 2): "scale",
    (aten.layer_norm.default, 3): "shift",
    (aten.rms_norm.default, 2): "scale",
    (aten.mul.Tensor, 0): "scale",
    (aten.mul.Tensor, 1): "scale",
    (aten.add.Tensor, 0): "shift",
    (aten.add.Tensor, 1): "shift",
    (aten.prelu.default, 1): "slope",
    (experts.grouped_linear.default, 1): "matrix",
    (experts.grouped_linear.default, 2): "shift",
    (experts.router.default, 1): "router",
    (experts.route.default, 1): "selection",
}


@dataclass(frozen=True)
class Role:
    """What one weight is for.

    `kind`: `matrix`, `table`, `router`, `mix` (the product that weighs two branches), `scale`, `shift`,
    `slope` (of a PReLU), `selection`, or `unknown`. `offset`: what is added to it before it is read.
    `reader`: the call that reads it, for messages. `layer`: the number of the region that reads it, -1 for
    the root. `padding`: of an embedding, the row that is never learned, -1 for none.
    """

    kind: str
    offset: float = 0.0
    reader: str = ""
    layer: int = -1
    padding: int = -1

    @property
    def agreed(self) -> tuple[str, float]:
        """What all readers of a weight have to agree on."""
        return ("matrix" if self.kind == "table" else self.kind), self.offset


def weight_roles(root: fx.GraphModule) -> dict[str, list[Role]]:
    """Structural name → its roles, one for every call that reads it, for parameters and buffers.

    Constants of regions count under their dotted name; a weight under two names has its roles under each.
    """
    found: dict[str, list[Role]] = {}
    for owner, module in graph_modules(root):
        for node in module.graph.nodes:
            value = weight_of(module, node)
            if value is not None:
                name = f"{owner}.{node.target}" if owner else str(node.target)
                found.setdefault(name, []).extend(_Reading(root, value).follow(owner, node, 0.0))
    return found


@dataclass
class _Reading:
    """Follows one weight through the graphs of a program."""

    root: fx.GraphModule
    value: Tensor

    def follow(self, owner: str, node: fx.Node, offset: float) -> Iterator[Role]:
        for user in node.users:
            if user.op == "output":
                yield from self._leave(owner, node, user, offset)
            elif user.op == "call_module":
                yield from self._enter(node, user, offset)
            elif user.target in MOVES and user.args[0] is node:
                yield from self.follow(owner, user, offset)
            elif (number := _added_number(user, node)) is not None:
                yield from self.follow(owner, user, offset + number)
            else:
                yield self._role(owner, node, user, offset)

    def _leave(self, owner: str, node: fx.Node, end: fx.Node, offset: float) -> Iterator[Role]:
        """A region hands the weight out: on with what its callers do with it."""
        returned: Any = end.args[0]
        for call in self.root.graph.nodes:
            if call.op != "call_module" or call.target != owner:
                continue
            if returned is node:
                yield from self.follow("", call, offset)
                continue
            for item in call.users:
                if item.target is operator.getitem and returned[item.args[1]] is node:
                    yield from self.follow("", item, offset)

    def _enter(self, node: fx.Node, call: fx.Node, offset: float) -> Iterator[Role]:
        module = self.root.get_submodule(str(call.target))
        assert isinstance(module, fx.GraphModule)
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        for given, inside in zip(call.args, inputs, strict=True):
            if given is node:
                yield from self.follow(str(call.target), inside, offset)

    def _role(self, owner: str, node: fx.Node, user: fx.Node, offset: float) -> Role:
        region = region_of(self.root.get_submodule(owner)) if owner else None
        kind = self._kind(node, user, region)
        if offset and kind != "scale":
            kind = "unknown"
        padding = int(argument(user, 2, "padding_idx", -1)) if user.target is aten.embedding.default else -1
        layer = region.index if region is not None else -1
        return Role(kind, offset, f"{user.name} ({user.target})", layer, padding)

    def _kind(self, node: fx.Node, user: fx.Node, region: Region | None) -> str:
        if not isinstance(user.target, torch._ops.OpOverload):
            return "unknown"
        places = [i for i, given in enumerate(arguments_of(user)) if given is node]
        kinds = {PLACES.get((user.target, place), "unknown") for place in places}
        kind = kinds.pop() if len(kinds) == 1 else "unknown"
        if kind in ("scale", "shift") and _alone(user):
            return "unknown"
        if kind == "shift" and sum(size > 1 for size in self.value.shape) > 1 and _is_sum(user):
            return "table"
        return "mix" if kind == "matrix" and region is not None and region.kind == "mix" else kind


def _added_number(user: fx.Node, node: fx.Node) -> float | None:
    """c where `user` is `node + c`, c a number."""
    if user.target is not aten.add.Tensor or argument(user, 2, "alpha", 1) != 1:
        return None
    others = [given for given in user.args[:2] if given is not node]
    return float(others[0]) if len(others) == 1 and isinstance(others[0], int | float) else None


def _is_sum(user: fx.Node) -> bool:
    return user.target is aten.add.Tensor


def _alone(user: fx.Node) -> bool:
    """Whether a sum or a product has no other value than one weight, with or without numbers."""
    if user.target not in (aten.add.Tensor, aten.mul.Tensor):
        return False
    values = [given for given in user.args[:2] if tensor(given) is not None]
    return len(set(values)) < 2
