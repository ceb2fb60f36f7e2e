"""Give values the names a person would use, numbered by layer.

before:  layer_norm_6 = layer_norm(add_11, …);  add_12 = add_11 + dropout_7
after:   n_3 = layer_norm(x_3, …);              x_4 = x_3 + d_3

`x` the residual stream, `n` a normalised value, `a` what attention returns, `y` what a feed-forward returns,
`e` an embedding, `p`, `mask`, `cos`, `sin` what positions give, `logits` the result. A second one of its
kind in a
layer gets a letter: `n_3`, `n_3b`. Before the first layer and after the last there are no numbers: `x`,
`x_b`.

Assumes: stage *structured* is complete but for names.
Contract: exact.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from moec.ir import Pass, Program, Region, region_of
from moec.ir.dependence import token_dependent
from moec.ir.graphs import graph_modules, output
from moec.ir.region import KINDS

from .names import Names, rename
from .position_names import position_word
from .region_names import region_names, size_word

aten = torch.ops.aten

WORDS = {"attention": "a", "ffn": "y", "moe": "m", "mix": "y", "positions": "positions"}
NORMS = {aten.layer_norm.default, aten.rms_norm.default}
STREAM = {aten.add.Tensor, aten.mul.Tensor}


@dataclass(frozen=True)
class NameValues(Pass):
    """See the module."""

    makes: ClassVar[str] = "structured"

    def apply(self, program: Program) -> Program:
        """Names for the regions first, which look at what the root calls them with; then for the root."""
        rename_regions(program.graph)
        rename_root(program.graph)
        return program


def rename_regions(root: fx.GraphModule, kinds: Collection[str] = KINDS) -> None:
    """Name the values inside the regions of these kinds, in place, by what the root calls them with."""
    takes, gives = _inputs(root), _position_words(root)
    for name, module in graph_modules(root):
        region = region_of(module)
        if region is not None and region.kind in kinds:
            rename(module, region_names(module, takes[name], gives.get(name, ())))


def rename_root(root: fx.GraphModule) -> None:
    """Name the values of a root graph, at stage *structured* or (without loss terms) *sparse*, in place."""
    rename(root, _root_names(root, _expert_names(root)))


def _expert_names(root: fx.GraphModule) -> dict[fx.Node, str]:
    """Names as the passes that make experts give them: `f_3` the dense part beside experts, `out_3` all that
    an expert layer returns, `m_3` its value, `y_3` what a layer gives in all."""
    calls = {str(node.target): node for node in root.graph.nodes if node.op == "call_module"}
    found: dict[fx.Node, str] = {}
    for call in calls.values():
        region = _region(root, call)
        if region is None or region.kind not in ("moe", "mix"):
            continue
        if region.kind == "mix":
            found[call] = f"y_{region.index}"
            continue
        found[call] = f"out_{region.index}"
        values = [user for user in call.users if user.target is operator.getitem and user.args[1] == 0]
        found |= dict.fromkeys(values, f"m_{region.index}")
        dense = calls.get(f"ffn_{region.index}")
        if dense is not None:
            found[dense] = f"f_{region.index}"
            sums = [u for u in dense.users if u.target is aten.add.Tensor and u.args[1] in values]
            found |= dict.fromkeys(sums, f"y_{region.index}")
    return found


def _inputs(root: fx.GraphModule) -> dict[str, list[str]]:
    """Region → the words for its inputs: `x` for the stream, others by what positions call them."""
    return {
        str(node.target): [_input_word(root, node, value, i) for i, value in enumerate(node.args)]
        for node in root.graph.nodes
        if node.op == "call_module"
    }


def _input_word(root: fx.GraphModule, call: fx.Node, value: object, position: int) -> str:
    assert isinstance(value, fx.Node)
    if value.op == "placeholder":
        return value.name
    if not isinstance(value.meta.get("val"), Tensor):
        return size_word(value)
    return "x" if position == 0 else position_word(root, value) or "x"


def _position_words(root: fx.GraphModule) -> dict[str, list[str]]:
    """What the results of the region of positions are called, in order, by the name of the region."""
    words = {}
    for call in root.graph.nodes:
        region = _region(root, call)
        if region is not None and region.kind == "positions":
            items = {u.args[1]: u for u in call.users if u.target is operator.getitem}
            results = [items[i] for i in sorted(items)] if items else [call]
            words[str(call.target)] = [position_word(root, node) or "v" for node in results]
    return words


def _root_names(root: fx.GraphModule, given: dict[fx.Node, str]) -> dict[fx.Node, str]:
    """A name for every value of the root that `given` has none for."""
    nodes = list(root.graph.nodes)
    names = Names(node.name for node in nodes if node.op in ("get_attr", "placeholder"))
    names.taken.add("logits")
    layers, last = _layers(root), _entry(root)
    result, found = output(root.graph).args[0], dict(given)
    for node in nodes:
        if node.op in ("placeholder", "output", "get_attr") or node in given:
            continue
        layer = layers.get(node) if isinstance(node.meta.get("val"), Tensor) else None
        word = _word(root, node, node is last)
        found[node] = names.take(word, layer) if layer is not None else names.letter(word)
    return found | ({result: "logits"} if isinstance(result, fx.Node) else {})


def _word(root: fx.GraphModule, node: fx.Node, is_entry: bool) -> str:
    region = _region(root, node)
    if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor) and _is_weight(node):
        return "w"
    if region is not None and not isinstance(node.meta.get("val"), tuple | list):
        return position_word(root, node) or WORDS[region.kind]
    if not isinstance(node.meta.get("val"), Tensor):
        return size_word(node) if region is None else WORDS[region.kind]
    if node.target in NORMS:
        return "n"
    if is_entry or node.target in STREAM:
        return "x"
    fixed = {aten.dropout.default: "d", aten.embedding.default: "e", aten.linear.default: "h"}
    return position_word(root, node) or fixed.get(node.target) or _operator(node)  # type: ignore[call-overload]


def _is_weight(node: fx.Node) -> bool:
    """Whether a value is computed from weights alone, in one step or two."""
    sources = node.all_input_nodes
    return bool(sources) and all(
        n.op == "get_attr" or (n.op == "call_function" and _is_weight(n)) for n in sources
    )


def _operator(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[1].strip("_") if isinstance(target, torch._ops.OpOverload) else "v"


def _region(root: fx.GraphModule, node: fx.Node) -> Region | None:
    return region_of(root.get_submodule(str(node.target))) if node.op == "call_module" else None


def _index(root: fx.GraphModule, node: fx.Node) -> int | None:
    region = _region(root, node)
    return region.index if region is not None and region.kind != "positions" else None


def _layers(root: fx.GraphModule) -> dict[fx.Node, int]:
    """The layer each value belongs to: a region's own, the one a norm feeds, else the latest of its inputs.

    What is computed from weights alone belongs where it is read. After the last residual sum there are no
    layers.
    """
    found: dict[fx.Node, int] = {}
    says = token_dependent(root.graph)
    nodes = list(root.graph.nodes)
    for node in nodes[: nodes.index(_last_sum(nodes, says)) + 1]:
        own = _index(root, node)
        feeds = [i for i in (_index(root, user) for user in node.users) if i is not None]
        behind = [found[n] for n in node.all_input_nodes if n in found]
        if own is not None:
            found[node] = own
        elif node.target in NORMS and feeds:
            found[node] = min(feeds)
        elif behind:
            found[node] = max(behind)
    _where_read(nodes, says, found)
    return found


def _where_read(nodes: list[fx.Node], says: set[fx.Node], found: dict[fx.Node, int]) -> None:
    for node in reversed(nodes):
        reads = [found[user] for user in node.users if user in found]
        if node.op == "call_function" and node not in says and reads:
            found[node] = min(reads)


def _last_sum(nodes: list[fx.Node], says: set[fx.Node]) -> fx.Node:
    """The last value that puts a result into the stream; without sums, the last call of a region."""
    sums = [
        n for n in nodes if n.target is aten.add.Tensor and len(says.intersection(n.all_input_nodes)) == 2
    ]
    calls = [n for n in nodes if n.op == "call_module"]
    return [nodes[0], *calls[-1:], *sums[-1:]][-1]


def _entry(root: fx.GraphModule) -> fx.Node | None:
    """The value that enters the first layer: the last one before it that carries the tokens."""
    first = next((node for node in root.graph.nodes if _index(root, node) is not None), None)
    if first is None:
        return None
    value = first.args[0]
    while isinstance(value, fx.Node) and value.target in NORMS:
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None
