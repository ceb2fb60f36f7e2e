"""Find every feed-forward by dataflow and make it a region.

before:  h = linear(x, up); h = gelu(h); y = linear(h, down)
after:   y = ffn_3(x)

A feed-forward is a closed region: one *down* product whose backward slice holds nothing but pointwise
operators,
dropout and views of features, until *up* products that share one input; at least one non-linearity; nothing
but the
last value leaves it. No class name is looked at. What comes near and is not one is recorded with the reason.

Assumes: stage *canonical*.
Contract: exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.ir import Ledger, Pass, Program, Region
from moec.ir.dependence import token_dependent
from moec.ir.graphs import drop_unused
from moec.ir.outline import common_path, outline, parameter_only, relative_names, tensors_read

from .feed_forward import FeedForward, Refusal, read_feed_forward
from .list_products import list_products

aten = torch.ops.aten


@dataclass(frozen=True)
class OutlineFeedForwards(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        root = program.graph
        program.ledger = list_products(program)
        claimed: set[fx.Node] = set()
        index = 0
        for down in [n for n in root.graph.nodes if n.target is aten.linear.default]:
            found = read_feed_forward(root.graph, down, token_dependent(root.graph), claimed)
            if isinstance(found, Refusal):
                program.ledger = _refused(program, down, found)
                continue
            program = _outline(program, found, index)
            index += 1
        drop_unused(root)
        return program


def _outline(program: Program, found: FeedForward, index: int) -> Program:
    root, weights = program.graph, parameter_only(program.graph.graph)
    targets = tensors_read(root, found.nodes, weights)
    names = _role_names(found, relative_names(targets))
    path = common_path(str(product.meta.get("path") or "") for product in found.products().values())
    region = Region(
        kind="ffn", index=index, path=path, source=found.down.meta.get("source", ""),
        roles={role: names[target] for target, role in found.weight_roles().items()},
    )  # fmt: skip
    program.ledger = _kept(program.ledger, found, region, program)
    _, program.origins = outline(
        root, program.origins, found.nodes, region,
        inputs=[(found.root, "x")], outputs=[found.down], name_weight=names.__getitem__,
    )  # fmt: skip
    return program


def _role_names(found: FeedForward, relative: dict[str, str]) -> dict[str, str]:
    """`up.weight`, `up.bias`, `gate.weight`, `down.weight`; other weights keep the user's last names."""
    names = dict(relative)
    for role, product in found.products().items():
        for position, leaf in ((1, "weight"), (2, "bias")):
            target = _weight_target(product, position)
            if target is not None:
                names[target] = f"{role}.{leaf}"
    return names


def _weight_target(product: fx.Node, position: int) -> str | None:
    value: Any = product.args[position] if len(product.args) > position else None
    while isinstance(value, fx.Node) and value.op != "get_attr":
        value = value.args[0]
    return str(value.target) if isinstance(value, fx.Node) else None


def _kept(ledger: Ledger, found: FeedForward, region: Region, program: Program) -> Ledger:
    for role, product in found.products().items():
        target = _weight_target(product, 1)
        if target is not None:
            ledger = ledger.update(
                [program.origins.public_name(target)], role=f"{region.name} {role}", status="kept",
                reason="a feed-forward, not selected by the plan", by="outline_feed_forwards",
            )  # fmt: skip
    return ledger


def _refused(program: Program, down: fx.Node, refusal: Refusal) -> Ledger:
    target = _weight_target(down, 1)
    if target is None:
        return program.ledger
    name = program.origins.public_name(target)
    current = next((e for e in program.ledger if e.weight == name), None)
    if current is None or current.role:
        return program.ledger
    status = "refused" if refusal.near_miss else "kept"
    return program.ledger.update([name], status=status, reason=refusal.reason, by="outline_feed_forwards")
