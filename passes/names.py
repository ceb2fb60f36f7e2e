"""Names for the values of one graph: handing them out without collision, and putting them on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx


class Names:
    """Hands out `x`, `x_1`, `x_2`, … each name once; with a layer `x_3`, `x_3b`, `x_3c`, …"""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.taken = set(taken)

    def take(self, word: str, layer: int | None = None) -> str:
        """The next free name for this word (and layer)."""
        first = word if layer is None else f"{word}_{layer}"
        count, name = 0, first
        while name in self.taken:
            count += 1
            name = f"{word}_{count}" if layer is None else lettered(first, count)
        self.taken.add(name)
        return name

    def letter(self, word: str) -> str:
        """The next free name of `x`, `x_b`, `x_c`, …, which no layer's name can be mistaken for."""
        count, name = 0, word
        while name in self.taken:
            count += 1
            name = lettered(f"{word}_", count)
        self.taken.add(name)
        return name


def lettered(word: str, count: int) -> str:
    """`word` for the first of its kind (0), then with `b`, `c`, …, `z`, `_26`, …"""
    return word if count == 0 else f"{word}{chr(ord('a') + count)}" if count < 26 else f"{word}_{count}"


def rename(module: fx.GraphModule, names: Mapping[fx.Node, str]) -> None:
    """Give `module` the same graph with these names; nodes without one keep theirs where it is free.

    The graph is built anew, so that torch's own table of names agrees with what stands in it.
    """
    fresh = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        name = names.get(node, node.name)
        node.name = name
        env[node] = fresh.node_copy(node, env.__getitem__)
        if node.op == "placeholder":
            env[node].target = name
    module.graph = fresh
    module.recompile()
