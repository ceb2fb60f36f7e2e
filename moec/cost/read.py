"""Reads what a program costs off its graph: one walk, one `Operation` for every operator.

    operations = read_operations(program.graph, program.layout)

Nothing runs. Sizes are those that stand in the graph (`sizes.py`); rows whose number is data are told by what
is known of the router (`tables.py`); what an operator does with them is its own formula
(`moec.runtime.ops.work`); what it sends is in `sendings.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import region_of
from moec.ir.graphs import attribute
from moec.ir.placement import Layout
from moec.runtime.ops.work import NOTHING, Work

from .call import GraphCall
from .kinds import kind_of
from .operation import Operation
from .operators import price_of
from .operators.default import default_price
from .sendings import sendings
from .sizes import SizeReader
from .tables import drawn, rows_of, table_of
from .value import Table, Value


def read_operations(
    graph: fx.GraphModule, layout: Layout | None = None, *, training: bool = True
) -> tuple[Operation, ...]:
    """Every operator of `graph` and its regions, in the order in which they run.

    `graph`: of a program of one process, or of one rank (stage *partitioned*, *cached* or *fused*), with the
    `layout` of that. `training`: gradients are computed and dropout runs.
    """
    walk = _Walk(graph, layout, training)
    walk.run(graph, None, "")
    return tuple(walk.operations)


class _Walk:
    def __init__(self, root: fx.GraphModule, layout: Layout | None, training: bool) -> None:
        self.sizes = SizeReader(root, layout.mesh if layout else None)
        self.layout, self.training = layout, training
        self.operations: list[Operation] = []

    def run(self, module: fx.GraphModule, inputs: Sequence[Value] | None, region: str) -> Any:
        """What `module` returns for `inputs`; None: those that the root is given."""
        known: dict[fx.Node, Any] = {}
        given = iter(inputs or ())
        for node in module.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given) if inputs is not None else self._value(node.meta["val"], node, ())
            elif node.op == "get_attr":
                known[node] = self._attribute(module, node, region)
            elif node.op == "call_module":
                inner = module.get_submodule(str(node.target))
                assert isinstance(inner, fx.GraphModule)
                arguments = fx.map_arg(node.args, known.__getitem__)
                known[node] = self.run(inner, arguments, str(node.target))
            elif node.op == "call_function":
                known[node] = self._call(node, known, region, module)
        return fx.map_arg(module.graph.output_node().args[0], known.__getitem__)

    def _attribute(self, module: fx.GraphModule, node: fx.Node, region: str) -> Any:
        held = attribute(module, str(node.target))
        if not isinstance(held, Tensor):
            return held  # `training`
        name = f"{region}.{node.target}" if region else str(node.target)
        placement = self.layout.of(name) if self.layout else None
        splits = {split.dim: split.axis for split in placement.splits} if placement else {}
        sizes = self.sizes.weight(held.shape, splits)
        return Value(sizes, held.dtype, held.requires_grad and self.training, name)

    def _value(self, meta: Any, node: fx.Node, operands: Sequence[Value], needs_grad: bool = False) -> Any:
        if isinstance(meta, Tensor):
            mark = str(node.meta.get("placement") or "")
            sizes = self.sizes.value(meta.shape, mark, operands)
            return Value(sizes, meta.dtype, needs_grad and meta.is_floating_point())
        if isinstance(meta, list | tuple):
            return [self._value(item, node, operands, needs_grad) for item in meta]
        return Value(None, known=self.sizes.size(meta) if isinstance(meta, int | torch.SymInt) else meta)

    def _call(self, node: fx.Node, known: dict[fx.Node, Any], region: str, module: fx.GraphModule) -> Any:
        if node.target is operator.getitem:
            return known[node.args[0]][node.args[1]]  # type: ignore[index]
        operands = [v for other in node.all_input_nodes for v in _values(known[other])]
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._value(node.meta.get("val"), node, operands)
        name = node.target._schema.name
        self._learn_rows(name, node, known)
        needs_grad = any(v.needs_grad for v in operands) and name != "aten::detach"
        results = self._value(node.meta.get("val"), node, operands, needs_grad)
        call = GraphCall(node, known, results, self.training)
        table = _drawn(name, call) or table_of(name, call)
        made = self._operation(name, node, call, operands, region, module)
        return _marked(results, table, made)

    def _learn_rows(self, name: str, node: fx.Node, known: dict[fx.Node, Any]) -> None:
        """Name the symbol of a number of rows when it first appears."""
        meta = node.meta.get("val")
        for value in meta if isinstance(meta, list | tuple) else [meta]:
            for size in value.shape if isinstance(value, Tensor) else ():
                unknown = self.sizes.unknown(size)
                if unknown is not None:
                    rows = rows_of(name, GraphCall(node, known, [], self.training))
                    assert rows is not None, f"{node}: {name} makes a number of rows that is not told"
                    self.sizes.letters[unknown] = rows

    def _operation(
        self,
        name: str,
        node: fx.Node,
        call: GraphCall,
        operands: Sequence[Value],
        region: str,
        module: fx.GraphModule,
    ) -> frozenset[int]:
        formula = price_of(name)
        price = formula(call) if formula else default_price(call)
        there, back = sendings(name, call)
        wanted = self.training and any(value.needs_grad for value in operands)
        found = region_of(module) if region else None
        after = frozenset[int]().union(*(value.made for value in operands))
        self.operations.append(
            Operation(
                f"{region}.{node.name}" if region else node.name,
                region,
                found.index if found else None,
                name,
                kind_of(name, found.kind if found else ""),
                _dtype(operands),
                price.forward,
                price.backward if wanted else NOTHING,
                (there,) if there else (),
                (back,) if back and wanted else (),
                price.saved if wanted else 0,
                sum((v.bytes for v in operands if v.weight), 0),
                tuple(sorted(after)),
            )
        )
        return frozenset([len(self.operations) - 1]) if _works(price.forward, there) else after


def _dtype(operands: Sequence[Value]) -> str:
    """The dtype that an operator computes in: that of its first operand that is not of integers."""
    found = next((value.dtype for value in operands if value.dtype.is_floating_point), torch.int64)
    return str(found).removeprefix("torch.")


def _works(work: Work, sent: Any) -> bool:
    return bool(work.calls) or sent is not None


def _drawn(name: str, call: GraphCall) -> Table | None:
    """The table that a router makes."""
    if name in ("moec::assign", "moec::admit"):
        tokens, top_k = call.shape("experts")
        return drawn(call, int(top_k), _experts(call), tokens)
    if name == "moec::gate":
        return drawn(call, int(call.value("top_k")), int(call.shape("router")[0]), call.shape("x")[0])
    return None


def _experts(call: GraphCall) -> int:
    given = call.arguments.get("num_experts")
    return int(given) if given is not None else int(call.shape("choices")[1])


def _values(known: Any) -> list[Value]:
    if isinstance(known, list | tuple):
        return [value for item in known for value in _values(item)]
    return [known] if isinstance(known, Value) else []


def _marked(results: Any, table: Table | None, made: frozenset[int]) -> Any:
    """The results with the operation that made them; those of integers carry the table."""
    if isinstance(results, list):
        return [_marked(item, table, made) for item in results]
    if not isinstance(results, Value):
        return results
    return replace(results, made=made, table=table if not results.needs_grad else None)
