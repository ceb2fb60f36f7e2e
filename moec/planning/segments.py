"""Where the layers of a lowered program stand among its operations."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from moec.cost.operation import Operation
from moec.errors import PassError
from moec.ir.graphs import output
from moec.passes.blocks import Block, blocks_of


@dataclass(frozen=True)
class Segments:
    """Which operations belong to which block: block b has those from `starts[b]` up to `starts[b + 1]`, the
    last entry being the end of the last block.

    `numbers[b]`: the number that its regions have. `exits[b]`: the operations that made what it gives.
    """

    starts: tuple[int, ...]
    numbers: tuple[int, ...]
    exits: tuple[tuple[int, ...], ...]

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
    return Segments(starts, tuple(number_of(block.regions) for block in blocks), exits)


def number_of(regions: Iterable[str]) -> int:
    """The number in the names of a block's regions: 3 of `attention_3`."""
    return int(next(iter(regions)).rpartition("_")[2])


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
