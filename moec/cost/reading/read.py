"""Reads what a program costs off its graph: one walk, one `Operation` for every operator.

    operations = read_operations(program.graph, program.layout)

Nothing runs. Sizes are those that stand in the graph (`sizes.py`); rows whose number is data are told by what
is known of the router (`tables.py`); what an operator does with them is its own formula
(`moec.runtime.ops.work`); what it sends is in `sendings.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from moec.cost.operation import Operation
from moec.cost.rank.weights import weight_sizes
from moec.cost.reading.asked import Answer, Oracle
from moec.cost.reading.call import GraphCall
from moec.cost.reading.gradients import Gradients
from moec.cost.reading.kinds import kind_of
from moec.cost.reading.operators import price_of
from moec.cost.reading.operators.attention import Attention, chosen
from moec.cost.reading.operators.default import default_price
from moec.cost.reading.routing import Routing
from moec.cost.reading.rows import Rows
from moec.cost.reading.sendings import sendings
from moec.cost.reading.sizes import SizeReader
from moec.cost.reading.tables import Tables
from moec.cost.reading.value import Sizes, Value, values_of
from moec.ir import region_of
from moec.ir.graphs import attribute
from moec.ir.mesh import Mesh
from moec.ir.placement import Layout, Placement
from moec.runtime.ops.work import NOTHING, Price, Work


@dataclass(frozen=True)
class Reading:
    """What one walk over a graph gives: its operations, and what is known of its inputs and of its results,
    nested as they are. `dealt`: sizes that are a number dealt out to ranks (`24/tensor`)."""

    operations: tuple[Operation, ...]
    inputs: tuple[Value, ...]
    results: Any
    dealt: frozenset[sympy.Expr] = frozenset()


def read_operations(
    graph: fx.GraphModule,
    layout: Layout | None = None,
    *,
    training: bool = True,
    attention: Attention | None = None,
    routing: Routing | None = None,
    rank: int = 0,
) -> tuple[Operation, ...]:
    """The operations of `read_graph`."""
    how = {"training": training, "attention": attention, "routing": routing, "rank": rank}
    return read_graph(graph, layout, **how).operations  # type: ignore[arg-type]


def read_graph(
    graph: fx.GraphModule,
    layout: Layout | None = None,
    *,
    training: bool = True,
    attention: Attention | None = None,
    routing: Routing | None = None,
    rank: int = 0,
) -> Reading:
    """Every operator of `graph` and its regions, in the order in which they run.

    `graph`: of a program of one process, or of one rank (stage *partitioned*, *cached* or *fused*), with the
    `layout` of that. `training`: gradients are computed and dropout runs. `attention`: by `flash` kernels or
    by `math`; None: by what torch takes on the device of the weights. `routing`: how tokens are dealt out to
    experts (None: evenly), of which the fullest rank is told, or `rank` where it was counted.
    """
    mesh = layout.mesh if layout else Mesh()
    tables = Tables(routing or Routing.balanced(), mesh, rank)
    walk = _Walk(graph, layout, training, attention, tables)
    results = walk.run(graph, None, "")
    tables.require_all_read()
    operations = tuple(walk.operations)
    if training:
        operations = walk.gradients.settled(operations, values_of(results))
    return Reading(operations, tuple(walk.inputs), results, frozenset(walk.sizes.dealt))


class _Walk:
    def __init__(
        self,
        root: fx.GraphModule,
        layout: Layout | None,
        training: bool,
        attention: Attention | None,
        tables: Tables,
    ) -> None:
        self.sizes = SizeReader(root, layout.mesh if layout else None)
        self.layout, self.training, self.attention = layout, training, attention
        self.device = next((weight.device.type for weight in root.parameters()), "cpu")
        self.oracle = Oracle(self.sizes.letters)
        self.tables = tables
        self.operations: list[Operation] = []
        self.inputs: list[Value] = []
        self.gradients = Gradients()

    def run(self, module: fx.GraphModule, inputs: Sequence[Value] | None, region: str) -> Any:
        """What `module` returns for `inputs`; None: those that the root is given."""
        known: dict[fx.Node, Any] = {}
        given = iter(inputs or ())
        for node in module.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given) if inputs is not None else self._input(node)
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

    def _input(self, node: fx.Node) -> Value:
        """What the root is given."""
        value = self._value(node.meta["val"], node, ())
        assert isinstance(value, Value)
        self.inputs.append(value)
        return value

    def _attribute(self, module: fx.GraphModule, node: fx.Node, region: str) -> Any:
        held = attribute(module, str(node.target))
        if not isinstance(held, Tensor):
            return self.training if node.target == "training" else held
        name = f"{region}.{node.target}" if region else str(node.target)
        sizes = self.sizes.noted(self._weight_sizes(name, held, even=bool(region)))
        return Value(sizes, held.dtype, held.requires_grad and self.training, name)

    def _weight_sizes(self, name: str, held: Tensor, even: bool) -> Sizes:
        placement = self.layout.of(name) if self.layout else Placement()
        if self.layout is None or not placement.splits:
            return tuple(map(sympy.Integer, held.shape))
        return weight_sizes(self.layout.shapes[name], placement, self.tables.places, even)

    def _value(self, meta: Any, node: fx.Node, operands: Sequence[Value]) -> Any:
        if isinstance(meta, Tensor):
            sizes = self.sizes.noted(self.sizes.value(meta.shape, node, operands))
            return Value(sizes, meta.dtype)
        if isinstance(meta, list | tuple):
            return [self._value(item, node, operands) for item in meta]
        return Value(None, known=self.sizes.size(meta) if isinstance(meta, int | torch.SymInt) else meta)

    def _call(self, node: fx.Node, known: dict[fx.Node, Any], region: str, module: fx.GraphModule) -> Any:
        if node.target is operator.getitem:
            return known[node.args[0]][node.args[1]]  # type: ignore[index]
        operands = [v for other in node.all_input_nodes for v in values_of(known[other])]
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._value(node.meta.get("val"), node, operands)
        name = node.target._schema.name
        self._learn_rows(name, node, known)
        results = self._value(node.meta.get("val"), node, operands)
        call = GraphCall(node, known, results, self.training)
        call.answer = self._asked(name, node, known, call)
        if name == "aten::scaled_dot_product_attention":
            call.attention = self.attention or chosen(node, known, self.device)
        tables = self.tables.of(name, call, known)
        made = self._operation(name, node, call, operands, region, module)
        return self._marked(results, call, tables, made)

    def _asked(self, name: str, node: fx.Node, known: dict[fx.Node, Any], call: GraphCall) -> Answer:
        """What torch says of views and gradients; collectives are told, as torch has none without ranks."""
        if not name.startswith("_c10d_functional::"):
            if call.inputs and call.tensor_results:
                return self.oracle.ask(node, known)
            return Answer((None,) * len(call.results), (False,) * len(call.results))
        view = 0 if name == "_c10d_functional::wait_tensor" else None
        return Answer((view,), (call.learns and call.results[0].dtype.is_floating_point,))

    def _learn_rows(self, name: str, node: fx.Node, known: dict[fx.Node, Any]) -> None:
        """Name the symbol of a number of rows when it first appears."""
        meta = node.meta.get("val")
        for value in meta if isinstance(meta, list | tuple) else [meta]:
            for size in value.shape if isinstance(value, Tensor) else ():
                unknown = self.sizes.unknown(size)
                if unknown is not None:
                    rows = self.tables.rows_of(name, GraphCall(node, known, [], self.training))
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
        price = _price(name, call)
        there, back = sendings(name, call, self.tables.mesh, self.tables.rank)
        wanted = self.training and any(call.answer.learns)
        found = region_of(module) if region else None
        after = frozenset[int]().union(*(value.made for value in operands))
        index = len(self.operations)
        self.operations.append(
            Operation(
                f"{region}.{node.name}" if region else node.name,
                region,
                found.index if found else None,
                name,
                kind_of(name, None in call.answer.views),
                _dtype(operands),
                price.forward,
                price.backward if wanted else NOTHING,
                (there,) if there else (),
                (back,) if back and wanted else (),
                0,
                sum((v.bytes for v in operands if v.weight), 0),
                tuple(sorted(after)),
            )
        )
        self.gradients.note(index, call, price)
        return frozenset([index]) if _works(price.forward, there) else after

    def _marked(self, results: Any, call: GraphCall, tables: dict[int, Rows], made: frozenset[int]) -> Any:
        """The results with the operation that made them; and the tables that are among them."""
        index = len(self.operations) - 1
        marked = [
            replace(
                value,
                made=made,
                needs_grad=call.answer.learns[place] and self.training,
                table=tables.get(place),
                memory=self.gradients.memory(index, call, place),
                pulls=frozenset([index]) if call.answer.learns[place] else frozenset(),
            )
            for place, value in enumerate(call.results)
        ]
        return marked if isinstance(results, list) else marked[0] if marked else results


def _price(name: str, call: GraphCall) -> Price:
    """What the call costs; a view of an operand costs nothing."""
    formula = price_of(name)
    if formula is not None:
        return formula(call)
    views = call.answer.views
    if views and all(view is not None for view in views):
        return Price(NOTHING)
    return default_price(call)


def _dtype(operands: Sequence[Value]) -> str:
    """The dtype that an operator computes in: that of its first operand that is not of integers."""
    found = next((value.dtype for value in operands if value.dtype.is_floating_point), torch.int64)
    return str(found).removeprefix("torch.")


def _works(work: Work, sent: Any) -> bool:
    return bool(work.calls) or sent is not None
