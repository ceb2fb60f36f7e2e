"""Numbers drawn over a picture: FLOPs and bytes of each line, forward, at the sizes that are asked for.

Costs are read off one still of each kind, cut out of its graph: layers that are alike cost the same.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

from moec.cost.operation import Operation
from moec.cost.reading.read import read_operations
from moec.cost.shown.spelling import formula
from moec.cost.symbols import symbol
from moec.ir.graphs import graph_module
from moec.ir.inputs import Input
from moec.ir.placement import Layout
from moec.view.stills import Frame, Still


@dataclass(frozen=True)
class Amounts:
    """Of one line, forward; None where a letter has no number. `text`: FLOPs as an expression."""

    flops: float | None = None
    bytes: float | None = None
    text: str = ""


NOTHING = Amounts()


@dataclass
class Overlays:
    """Reads costs at `sizes` (letter → number), each still once. `layout`: of a program of one rank.

    `notes`: what could not be read, and why; pictures of early stages hold operators as users wrote them, and
    one that has no cost is no reason not to look at the others.
    """

    sizes: Mapping[str, int]
    layout: Layout | None = None
    notes: list[str] = field(default_factory=list)
    _known: dict[Hashable, tuple[Amounts, ...]] = field(default_factory=dict)

    def of(self, frame: Frame, still: Still) -> tuple[Amounts, ...]:
        """The amounts of the entries of a still, in their order."""
        if still.face not in self._known:
            self._known[still.face] = self._read_or_noted(frame, still)
        return self._known[still.face]

    def _read_or_noted(self, frame: Frame, still: Still) -> tuple[Amounts, ...]:
        try:
            return self._read(frame, still)
        except Exception as error:
            what = str(error).strip().splitlines()[:1]
            self.notes.append(f"no FLOPs and bytes of {still.key}: {type(error).__name__}: {''.join(what)}")
            return (NOTHING,) * len(still.entries)

    def _read(self, frame: Frame, still: Still) -> tuple[Amounts, ...]:
        cut, names = cut_out(frame, still)
        # Axes of ranks are letters where one rank's graph is read; a graph of all ranks has none.
        layout = self.layout if frame.of_one_rank else None
        operations = {one.name: one for one in read_operations(cut, layout, training=False)}
        numbers = {symbol(letter): number for letter, number in self.sizes.items()}
        numbers |= {symbol(axis): n for axis, n in (layout.mesh.axes() if layout else {}).items()}
        places = (names.get(entry.node) if entry.kind == "line" else None for entry in still.entries)
        return tuple(_amounts(operations.get(name), numbers) if name else NOTHING for name in places)


def _amounts(operation: Operation | None, numbers: Mapping[Any, int]) -> Amounts:
    if operation is None:
        return NOTHING
    flops = sympy.sympify(operation.forward.flops)
    text = formula(flops) if flops.free_symbols else ""
    return Amounts(_number(flops, numbers), _number(sympy.sympify(operation.forward.bytes), numbers), text)


def _number(amount: sympy.Expr, numbers: Mapping[Any, int]) -> float | None:
    found = amount.xreplace({letter: sympy.Integer(number) for letter, number in numbers.items()})
    return None if found.free_symbols else float(found)


def cut_out(frame: Frame, still: Still) -> tuple[fx.GraphModule, dict[fx.Node, str]]:
    """The still as a graph of its own, and the name that each of its lines has among the operations read.

    What enters it becomes an input: values in floating point of sizes that are known. Anything else that it
    needs (sizes, masks, tables of rows) is computed inside, as it was.
    """
    own = _own_nodes(frame, still)
    computed, given = _needed(own)
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in frame.root.graph.nodes:
        if node.op == "placeholder" or node in computed:
            made[node] = graph.node_copy(node, made.__getitem__)
        elif node in given:
            made[node] = _input(graph, node)
    graph.output(None)
    regions = {line.node: line.region for line in frame.flow.lines}
    names = {e.node: e.node.name if regions[e.node] else made[e.node].name for e in still.entries
             if e.kind == "line" and e.node.op.startswith("call_")}  # fmt: skip
    named = {node: f"{regions[node]}.{name}" if regions[node] else name for node, name in names.items()}
    return graph_module(frame.root, graph), named


def _own_nodes(frame: Frame, still: Still) -> set[fx.Node]:
    """The nodes of the root that a still is made of: its lines, what they unpack, the regions it calls."""
    lines = [entry.drawn for entry in still.entries if entry.drawn is not None]
    own = {line.node for line in lines if not line.region and line.node.op.startswith("call_")}
    own |= {box.call for box in still.boxes}
    return own | {user for node in own for user in node.users if user.target is operator.getitem}


def _needed(own: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """What is computed in the cut, and what is given to it."""
    computed, given = set(own), set[fx.Node]()
    waiting = [other for node in own for other in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node in computed or node in given or node.op == "placeholder":
            continue
        if _can_be_given(node):
            given.add(node)
        else:
            computed.add(node)
            waiting += node.all_input_nodes
    return computed, given


def _can_be_given(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op == "get_attr" or not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    sizes: list[Any] = [size for size in value.shape if isinstance(size, torch.SymInt)]
    letters = (letter for size in sizes for letter in size.node.expr.free_symbols)
    return not any(symbol_is_type(letter, SymT.UNBACKED_INT) for letter in letters)


def _input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A value that is given: its sizes are those of the graph that it is from, not letters of its own."""
    value = node.meta["val"]
    given = graph.create_node("placeholder", node.name, name=node.name)
    given.meta = {"val": value, "input": Input((0,) * value.dim(), value.dtype)}
    if node.meta.get("placement"):
        given.meta["placement"] = node.meta["placement"]
    return given
