"""Give values the names a person would use, numbered by layer.

before:  layer_norm_6 = layer_norm(add_11, …);  add_12 = add_11 + dropout_7
after:   n_3 = layer_norm(x_3, …);              x_4 = x_3 + d_3

`x` the residual stream, `n` a normalised value, `a` what attention returns, `y` what a feed-forward returns,
`logits` the result. A second one of its kind in a layer gets a letter: `n_3`, `n_3b`.

Assumes: stage *structured* is complete but for names.
Contract: exact.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from moec.ir import Pass, Program, region_of
from moec.ir.graphs import graph_modules, output

aten = torch.ops.aten

LETTERS = {"attention": "a", "ffn": "y", "moe": "m", "mix": "y"}
NORMS = {aten.layer_norm.default, aten.rms_norm.default}
SHORT = {
    "linear": "h", "unflatten": "u", "scaled_dot_product_attention": "o", "transpose": "t", "flatten": "f",
    "embedding": "x", "dropout": "d", "layer_norm": "n", "rms_norm": "n",
}  # fmt: skip


@dataclass(frozen=True)
class NameValues(Pass):
    """See the module."""

    makes: ClassVar[str] = "structured"

    def apply(self, program: Program) -> Program:
        _name_root(program.graph)
        for name, module in graph_modules(program.graph):
            if name:
                _name_region(module)
        return program


def _name_root(root: fx.GraphModule) -> None:
    layers, names = _layers(root), _Names()
    result = output(root.graph).args[0]
    for node in list(root.graph.nodes):
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if node is result:
            node.name = "logits"
        else:
            letter = _letter(root, node)
            if letter is not None:
                node.name = names.take(letter, layers.get(node))
    root.recompile()


def _letter(root: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op == "call_module":
        region = region_of(root.get_submodule(str(node.target)))
        return LETTERS.get(region.kind) if region is not None else None
    if not isinstance(node.meta.get("val"), Tensor):
        return None
    if node.target in NORMS:
        return "n"
    if node.target is aten.dropout.default:
        return "d"
    return "x" if node.target in (aten.embedding.default, aten.add.Tensor, aten.mul.Tensor) else None


def _layers(root: fx.GraphModule) -> dict[fx.Node, int]:
    """The layer each value belongs to: a region's own, the layer of the region it feeds, or its inputs'."""
    found: dict[fx.Node, int] = {}
    for node in root.graph.nodes:
        own = _region_index(root, node)
        feeds = [i for i in (_region_index(root, user) for user in node.users) if i is not None]
        behind = [found[n] for n in node.all_input_nodes if n in found]
        if own is not None:
            found[node] = own
        elif node.target in NORMS and feeds:
            found[node] = min(feeds)
        elif behind:
            found[node] = max(behind)
    return found


def _region_index(root: fx.GraphModule, node: fx.Node) -> int | None:
    if node.op != "call_module":
        return None
    region = region_of(root.get_submodule(str(node.target)))
    return region.index if region is not None and region.kind != "positions" else None


def _name_region(module: fx.GraphModule) -> None:
    """Inside a region: the short name of the operator, `h` for products."""
    names = _Names()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            names.reserve(node.name)
    for node in module.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            node.name = names.take(_operator_letter(node), None)
    module.recompile()


def _operator_letter(node: fx.Node) -> str:
    target: Any = node.target
    name = target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else "v"
    return SHORT.get(name, name.strip("_"))


class _Names:
    """Hands out `x_3`, `x_3b`, `x_3c`, … (or `h`, `h_1`, `h_2` without a layer)."""

    def __init__(self) -> None:
        self.count: dict[tuple[str, int | None], int] = defaultdict(int)

    def reserve(self, name: str) -> None:
        """Mark a name as taken."""
        self.count[(name, None)] += 1

    def take(self, letter: str, layer: int | None) -> str:
        """The next free name for this letter and layer."""
        seen = self.count[(letter, layer)]
        self.count[(letter, layer)] += 1
        if layer is None:
            return f"{letter}_{seen}" if seen else letter
        return f"{letter}_{layer}{chr(ord('a') + seen) if 0 < seen < 26 else (f'_{seen}' if seen else '')}"
