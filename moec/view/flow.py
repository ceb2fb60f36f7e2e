"""Who reads whom in a graph, seen through its regions: what is drawn, in the order in which it runs.

Lines of the program's text are what is drawn: a value that the text unpacks stands in the line that computes
it, weights stand where they are read, and a region is a box around its own lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from moec.ir.graphs import attribute
from moec.ir.text import block_of, unpacked


@dataclass(frozen=True)
class Reading:
    """What stands behind a value: drawn nodes, and weights as (full name, the node that reads it)."""

    nodes: tuple[fx.Node, ...] = ()
    weights: tuple[tuple[str, fx.Node], ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A line: its `node`, the `region` it stands in ('' for the root), the `block` as the text names it
    (`3 · transformer.h.3`), the `items` it unpacks, and what it reads."""

    node: fx.Node
    region: str
    block: str
    items: tuple[fx.Node | None, ...]
    reads: Reading


@dataclass
class Flow:
    """All lines of a graph, and the call of each region that is opened (`calls`)."""

    root: fx.GraphModule
    lines: list[Drawn] = field(default_factory=list)
    calls: dict[str, fx.Node] = field(default_factory=dict)
    _behind: dict[fx.Node, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._walk(self.root, "", (), "")

    def _walk(self, module: fx.GraphModule, region: str, given: Sequence[Any], block: str) -> Any:
        """Draw the lines of a graph; gives what stands behind its results."""
        arguments, skipped = iter(given), set[fx.Node]()
        for node in module.graph.nodes:
            if node.op == "output" and region:
                return fx.node.map_arg(node.args[0], self._behind.__getitem__)
            if node in skipped:
                continue
            if node.op == "get_attr":
                self._behind[node] = _weight(module, node, region)
            elif node.op == "placeholder" and region:
                self._behind[node] = next(arguments)
            else:
                block = self._block(node, region, block)
                items = tuple(unpacked(node, module))
                skipped.update(item for item in items if item is not None)
                self._behind[node] = self._line(module, node, region, block, items)
                self._behind |= {
                    item: _part(self._behind[node], place)
                    for place, item in enumerate(items)
                    if item is not None
                }
        return None

    def _block(self, node: fx.Node, region: str, block: str) -> str:
        if node.op in ("placeholder", "output"):
            return ""
        return block if region else block_of(node, self.root, block)

    def _line(
        self,
        module: fx.GraphModule,
        node: fx.Node,
        region: str,
        block: str,
        items: tuple[fx.Node | None, ...],
    ) -> Any:
        """What stands behind `node`: itself, or the results of the region that it opens."""
        name = str(node.target)
        if node.op == "call_module" and name not in self.calls and not region:
            child = module.get_submodule(name)
            assert isinstance(child, fx.GraphModule)
            self.calls[name] = node
            return self._walk(child, name, [self._of(argument) for argument in node.args], block)
        reads = merged(self._of((node.args, node.kwargs)))
        self.lines.append(Drawn(node, region, block, items, reads))
        return Reading((node,))

    def _of(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, self._behind.__getitem__)


def merged(value: Any) -> Reading:
    """Everything behind a value of several parts, each once."""
    found = list(_readings(value))
    nodes = dict.fromkeys(node for one in found for node in one.nodes)
    weights = dict.fromkeys(weight for one in found for weight in one.weights)
    return Reading(tuple(nodes), tuple(weights))


def _readings(value: Any) -> Iterator[Reading]:
    if isinstance(value, Reading):
        yield value
    elif isinstance(value, dict):
        yield from (one for part in value.values() for one in _readings(part))
    elif isinstance(value, list | tuple):
        yield from (one for part in value for one in _readings(part))


def _part(value: Any, place: int) -> Any:
    """One of the parts that are unpacked: of a region its own, of an operator the line."""
    return value[place] if isinstance(value, list | tuple) else value


def _weight(module: fx.GraphModule, node: fx.Node, region: str) -> Reading:
    if not isinstance(attribute(module, str(node.target)), Tensor):
        return Reading()  # `training`
    return Reading(weights=((f"{region}.{node.target}" if region else str(node.target), node),))
