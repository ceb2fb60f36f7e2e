"""Put everything an expert layer does with its rows into one operator.

before:  rows = moec.dispatch(tokens, order, top_k=2)
         gate = moec.grouped_linear(rows, self.gate.weight, None, counts)
         up = moec.grouped_linear(rows, self.up.weight, None, counts)
         h = silu(gate);  h_1 = h * up
         out = moec.grouped_linear(h_1, self.down.weight, None, counts)
         sums = moec.combine(out, weights, order, counts)
after:   sums = moec.moe_ffn(tokens, weights, order, counts, [self.gate.weight, self.up.weight,
             self.down.weight], [None, None, None], "lambda gate, up: silu(gate) * up")

Rows are then gathered as they are read and answers added as they are made, and training keeps the results of
the up products alone. What stands between the products must be a formula (`inner_formula.py`); a layer whose
rows travel to other ranks, or one of whose inner values is read elsewhere, stays as it is.

Assumes: expert layers as `lift_experts` writes them.
Contract: exact.
Source:  SonicMoE, arXiv 2512.14080 (what backward keeps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir import Check, Pass, Program
from moec.ir.graphs import drop_unused, graph_modules
from moec.ir.identity import made_from
from moec.ir.patterns import arguments_of, is_call

from .fusion_notes import DeclinedError, note_fusions
from .inner_formula import read_inner
from .prove_fusion import prove_fusion

ops = torch.ops.moec
aten = torch.ops.aten
GROUPED = ops.grouped_linear.default


@dataclass(frozen=True)
class FuseMoeFfn(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        findings = []
        for name, module in graph_modules(program.graph):
            fused = False
            for sums in [node for node in module.graph.nodes if is_call(node, ops.combine.default)]:
                try:
                    findings.append((name, _fuse(sums)))
                    fused = True
                except DeclinedError as reason:
                    findings.append((name, f"dispatch, products and combine stay: {reason}"))
            if fused:
                drop_unused(module)
        note_fusions(program, self.name, findings)
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """Every result and gradient, in both modes."""
        return prove_fusion(before, after)


def _fuse(sums: fx.Node) -> str:
    """Replace what `sums` ends by one operator, and say so; raises `DeclinedError`."""
    out, weights, order, counts = arguments_of(sums)
    down = _product(out, counts)
    last: Any = down.args[0]
    ups = _ups(last)
    rows: Any = ups[0].args[0]
    if not is_call(rows, ops.dispatch.default) or rows.args[1] is not order:
        raise DeclinedError("its rows travel between ranks")
    for up in ups:
        _product(up, counts)
    formula = read_inner(ups, last)
    _require_closed([rows, *ups, *_between(ups, down), down], sums)
    products = [*ups, down]
    inputs = (
        rows.args[0], weights, order, counts, [p.args[1] for p in products], [p.args[2] for p in products],
        str(formula),
    )  # fmt: skip
    with sums.graph.inserting_before(sums):
        fused = sums.graph.call_function(ops.moe_ffn.default, inputs)
    name = sums.name
    made_from(fused, sums, *products, taking=("path", "source", "val"))
    sums.replace_all_uses_with(fused, propagate_meta=False)
    sums.graph.erase_node(sums)
    fused.name = name
    return f"dispatch, {len(products)} products, `{formula}` and combine in one operator, moec.moe_ffn"


def _product(node: Any, counts: Any) -> fx.Node:
    """`node`, which must be a product over the rows that `counts` counts."""
    if not is_call(node, GROUPED) or _counted(node.args[3]) is not _counted(counts):
        raise DeclinedError("its rows travel between ranks")
    found: fx.Node = node
    return found


def _counted(counts: Any) -> Any:
    """The counts that an expert axis of one rank adds up: sum(unflatten(counts, 0, [1, E]), [0])."""
    if is_call(counts, aten.sum.dim_IntList) and is_call(counts.args[0], aten.unflatten.int):
        source, dim, sizes = counts.args[0].args
        if (dim, sizes[0], list(counts.args[1])) == (0, 1, [0]):
            return source
    return counts


def _ups(last: Any) -> list[fx.Node]:
    """The products that `last` is computed from, all of the same rows, in graph order."""
    found, seen, waiting = set[fx.Node](), set[fx.Node](), [last]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if is_call(node, GROUPED):
            found.add(node)
        else:
            waiting += node.all_input_nodes
    ups = [node for node in last.graph.nodes if node in found]
    if not ups:
        raise DeclinedError("no product over rows before the down product")
    if any(up.args[0] is not ups[0].args[0] for up in ups):
        raise DeclinedError("its up products read different rows")
    return ups


def _between(ups: list[fx.Node], down: fx.Node) -> list[fx.Node]:
    found, waiting = set[fx.Node](), list(down.args[:1])
    while waiting:
        node = waiting.pop()
        if isinstance(node, fx.Node) and node not in ups and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return list(found)


def _require_closed(nodes: list[fx.Node], end: fx.Node) -> None:
    """Refuse a layer one of whose inner values is read from outside."""
    inside = {*nodes, end}
    for node in nodes:
        for user in node.users:
            if user not in inside and not is_call(user, aten.sym_size.int):
                raise DeclinedError(f"`{node.name}` is also read by `{user.name}`")
