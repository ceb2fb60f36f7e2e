"""Which blocks of a program are alike, so that one of each kind tells the cost of all.

Two blocks are alike when their graphs are the same node by node, regions and sizes of weights included, once
names and numbers of layers are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor, fx

from moec.ir import region_of
from moec.ir.graphs import attribute
from moec.passes.blocks import Block

_OF_ONE_LAYER = ("index", "path", "source")


def kinds_of(root: fx.GraphModule, blocks: Sequence[Block]) -> list[int]:
    """The kind of each block, as the index of the first block that is like it; reads the graph alone."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(_signature(root, block), block.index) for block in blocks]


def shared_weights(root: fx.GraphModule, blocks: Sequence[Block]) -> list[str]:
    """Names of weights that several blocks read, sorted: such blocks cannot be counted one by one."""
    readers: Counter[int] = Counter()
    names: dict[int, str] = {}
    for block in blocks:
        held = {id(weight): name for name, weight in _weights(root, block)}
        readers.update(held.keys())
        names |= held
    return sorted(names[weight] for weight, count in readers.items() if count > 1)


def _weights(root: fx.GraphModule, block: Block) -> list[tuple[str, Tensor]]:
    found = [(f"{name}.{leaf}", w) for name in block.regions for leaf, w in _inside(root, name)]
    read = {node for call in block.nodes for node in call.all_input_nodes if node.op == "get_attr"}
    at_root = [(str(node.target), attribute(root, str(node.target))) for node in read]
    return [*found, *((name, value) for name, value in at_root if isinstance(value, Tensor))]


def _inside(root: fx.GraphModule, region: str) -> list[tuple[str, Tensor]]:
    return list(root.get_submodule(region).named_parameters())


def _signature(root: fx.GraphModule, block: Block) -> Hashable:
    local = {block.entry: "entry"} | {node: f"%{i}" for i, node in enumerate(block.nodes)}
    return _calls(root, block.nodes, local)


def _calls(module: fx.GraphModule, nodes: Sequence[fx.Node], local: dict[fx.Node, str]) -> Hashable:
    def told(other: fx.Node) -> str:
        if other.op == "get_attr":
            return _weight(module, other)
        return local.get(other) or f"outside {other.name}"

    return tuple(
        (_target(module, node), str(fx.map_arg(node.args, lambda n: _Named(told(n)))),
         str(fx.map_arg(node.kwargs, lambda n: _Named(told(n)))), _value(node.meta.get("val")))
        for node in nodes
    )  # fmt: skip


class _Named(str):
    """A name that stands in a printed argument without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _target(module: fx.GraphModule, node: fx.Node) -> Hashable:
    if node.op != "call_module":
        return f"{node.op} {node.target}"
    inner = module.get_submodule(str(node.target))
    assert isinstance(inner, fx.GraphModule)
    region, nodes = region_of(inner), list(inner.graph.nodes)
    calls = [one for one in nodes if one.op not in ("get_attr", "placeholder")]
    local = {one: f"%{i}" for i, one in enumerate(calls)}
    local |= {one: f"input {i}" for i, one in enumerate(n for n in nodes if n.op == "placeholder")}
    kind, settings = (region.kind, sorted(region.settings.items())) if region else ("", [])
    return kind, repr(settings), _calls(inner, calls, local)


def _weight(module: fx.GraphModule, node: fx.Node) -> str:
    held = attribute(module, str(node.target))
    if not isinstance(held, Tensor):
        return str(node.target)
    return f"weight {tuple(held.shape)} {held.dtype} {held.requires_grad}"


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {[str(size) for size in value.shape]}"
    if isinstance(value, list | tuple):
        return str([_value(item) for item in value])
    return str(value)
