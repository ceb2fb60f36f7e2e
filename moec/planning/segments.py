"""Where the layers of a lowered program stand among its operations."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from moec.cost.operation import Operation
from moec.errors import PassError
from moec.ir.graphs import named_weights, output
from moec.passes.blocks import Block, blocks_of


@dataclass(frozen=True)
class Segments:
    """Which operations belong to which block: block b has those from `starts[b]` up to `starts[b + 1]`, the
    last entry being the end of the last block.

    `numbers[b]`: the number that its regions have. `exits[b]`: the operations that made what it gives.
    `weight_of`: structural name of a weight → the block that reads it; `input_of`: the same for inputs of the
    graph (a decoder's caches), by position. What several blocks read, or none, is in neither.
    """

    starts: tuple[int, ...]
    numbers: tuple[int, ...]
    exits: tuple[tuple[int, ...], ...]
    weight_of: Mapping[str, int]
    input_of: Mapping[int, int]

    def block(self, index: int) -> int | None:
        """The block of operation `index`; None before and after all of them."""
        if not self.starts[0] <= index < self.starts[-1]:
            return None
        return next(b for b, end in enumerate(self.starts[1:]) if index < end)


def segments_of(root: fx.GraphModule, operations: Sequence[Operation]) -> Segments:
    """The segments of a lowered program with the graph `root`, of which `operations` were read.

    Raises `PassError` where the operations of a block do not stand together.
    """
    blocks = blocks_of(root)
    found = [_places(block, operations) for block in blocks]
    starts = (min(found[0]), *(max(places) + 1 for places in found))
    for block, places, start in zip(blocks, found, starts, strict=False):
        if min(places) < start:
            where, name = f"the operations of layer {block.index}", operations[min(places)].name
            raise PassError(where, f"`{name}` stands among those of another layer", "layers one by one")
    exits = tuple(_made(_name_of(root, block.exit), operations) for block in blocks)
    numbers = tuple(number_of(block.regions) for block in blocks)
    return Segments(starts, numbers, exits, _weights(root, blocks), _inputs(root, blocks))


def number_of(regions: Iterable[str]) -> int:
    """The number in the names of a block's regions: 3 of `attention_3`."""
    return int(next(iter(regions)).rpartition("_")[2])


def _weights(root: fx.GraphModule, blocks: Sequence[Block]) -> dict[str, int]:
    """Which block reads a weight: in one of its regions, or at the root."""
    read: dict[str, set[int]] = defaultdict(set)
    for block in blocks:
        for name in block.regions:
            for leaf, _ in named_weights(root.get_submodule(name)):
                read[f"{name}.{leaf}"].add(block.index)
        for node in _read_at_root(block, "get_attr"):
            read[str(node.target)].add(block.index)
    return {name: min(of) for name, of in read.items() if len(of) == 1}


def _inputs(root: fx.GraphModule, blocks: Sequence[Block]) -> dict[int, int]:
    places = {n: i for i, n in enumerate(n for n in root.graph.nodes if n.op == "placeholder")}
    read: dict[int, set[int]] = defaultdict(set)
    for block in blocks:
        for node in _read_at_root(block, "placeholder"):
            read[places[node]].add(block.index)
    return {place: min(of) for place, of in read.items() if len(of) == 1}


def _read_at_root(block: Block, kind: str) -> list[fx.Node]:
    return [other for node in block.nodes for other in node.all_input_nodes if other.op == kind]


def _places(block: Block, operations: Sequence[Operation]) -> list[int]:
    names, regions = {node.name for node in block.nodes}, set(block.regions)
    return [i for i, o in enumerate(operations) if (o.region in regions if o.region else o.name in names)]


def _name_of(root: fx.GraphModule, node: fx.Node) -> str:
    """The name of the operation behind a node of the root: `x_3b`, `mix_3.y`."""
    position = 0
    if node.target is operator.getitem:
        node, position = node.args  # type: ignore[assignment]
    if node.op != "call_module":
        return node.name
    inner = root.get_submodule(str(node.target))
    assert isinstance(inner, fx.GraphModule)
    given = output(inner.graph).args[0]
    made = given[position] if isinstance(given, tuple | list) else given
    assert isinstance(made, fx.Node)
    return f"{node.target}.{made.name}"


def _made(name: str, operations: Sequence[Operation]) -> tuple[int, ...]:
    """What a reader of the operation `name` waits for: itself, or for a view those that it looks at."""
    index = next(i for i, one in enumerate(operations) if one.name == name)
    read = any(index in one.after for one in operations)
    return (index,) if read else operations[index].after
