"""Add to the residual stream and normalise it in one operator.

before:  x_3 = x_2 + a_3
         n_3 = rms_norm(x_3, [64], self.blocks[3].norm.weight, 1e-05)
after:   x_3, n_3 = moec.add_rms_norm(x_2, a_3, self.blocks[3].norm.weight, eps=1e-05)

For decoders on a GPU, where it is one kernel in the place of two or three. On a CPU it would be none the
faster: sum and norm of one row take 4 us of a step of milliseconds, less than the call of an operator of our
own; of 2048 rows of 512 they take half a millisecond beside 50 of the products.

Assumes: the norm runs over the last dim, by weights of the program.
Contract: exact.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir import Check, Pass, Program
from moec.ir.graphs import graph_modules
from moec.ir.identity import made_from
from moec.ir.patterns import arguments_of, is_call, same_shape, tensor

from .fusion_notes import note_fusions
from .prove_fusion import prove_fusion

aten = torch.ops.aten
JOINED: dict[Any, Any] = {
    aten.rms_norm.default: torch.ops.moec.add_rms_norm.default,
    aten.layer_norm.default: torch.ops.moec.add_layer_norm.default,
}


@dataclass(frozen=True)
class FuseNorms(Pass):
    """See the module. `devices`: where it is done."""

    devices: tuple[str, ...] = ("cuda",)

    def apply(self, program: Program) -> Program:
        findings = []
        for name, module in graph_modules(program.graph):
            for norm in [node for node in module.graph.nodes if is_call(node, *JOINED)]:
                if not _is_sum(norm):
                    continue
                device = tensor(norm).device.type  # type: ignore[union-attr]
                told = f"sum and norm stay: on a {device} one operator is no faster"
                if device in self.devices:
                    _fuse(norm)
                    told = "sum and norm in one operator"
                findings.append((name or "root", told))
            module.recompile()
        note_fusions(program, self.name, dict.fromkeys(findings))
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """Every result and gradient, in both modes."""
        return prove_fusion(before, after)


def _is_sum(norm: fx.Node) -> bool:
    """Whether a norm over the last dim reads a sum of two values of its shape, and weights as they are."""
    total, sizes, weights, eps = _parts(norm)
    if not is_call(total, aten.add.Tensor) or len(sizes) != 1 or eps is None:
        return False
    left, right, factor = arguments_of(total)
    shape = norm.meta["val"].shape
    same = all(
        tensor(part) is not None and same_shape(part.meta["val"].shape, shape) for part in (left, right)
    )
    return same and factor == 1 and all(weight is None or weight.op == "get_attr" for weight in weights)


def _parts(norm: fx.Node) -> tuple[Any, Any, list[Any], Any]:
    """What a norm reads, over which sizes, its weights, and its epsilon."""
    total, sizes, *rest = arguments_of(norm)
    count = 2 if norm.target is aten.layer_norm.default else 1
    return total, sizes, rest[:count], rest[count]


def _fuse(norm: fx.Node) -> None:
    total, _, weights, eps = _parts(norm)
    graph, names = norm.graph, (total.name, norm.name)
    for weight in weights:
        if weight is not None and total < weight:  # an earlier norm may read it too
            total.prepend(weight)
    with graph.inserting_before(total):
        both = graph.call_function(JOINED[norm.target], (*total.args[:2], *weights, eps))
        both.name = graph._graph_namespace.create_name("added", None)
        items = [graph.call_function(operator.getitem, (both, place)) for place in (0, 1)]
    made_from(both, norm, total)
    for old, item in ((norm, items[1]), (total, items[0])):
        made_from(item, old, taking=("path", "source", "val"))
        old.replace_all_uses_with(item, propagate_meta=False)
        graph.erase_node(old)
    items[0].name, items[1].name = names
