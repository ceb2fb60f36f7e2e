"""Names inside regions: the same in every layer, so that regions that do the same are the same text.

attention   x in; q, k, v with what leads to each; s scores, p probabilities, o what the heads return; y out
ffn         x in; gate, up and h inside; out
positions   i positions, mask, cos, sin, p
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import Region, region_of
from moec.ir.dependence import token_dependent
from moec.ir.graphs import output
from moec.ir.patterns import is_call

from .names import Names

aten = torch.ops.aten

PRODUCTS = {aten.matmul.default, aten.bmm.default}
OWN_WORD = {
    "arange": "i",
    "cos": "cos",
    "sin": "sin",
    "triu": "mask",
    "tril": "mask",
    "embedding": "p",
    "t": "w",
}
VIEWS = {
    aten.unsqueeze.default, aten.unflatten.int, aten.flatten.using_ints, aten.expand.default,
    aten.transpose.int, aten.slice.Tensor, aten.reshape.default, aten.permute.default, aten.to.dtype,
}  # fmt: skip


def region_names(
    module: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str] = ()
) -> dict[fx.Node, str]:
    """A name for every value of a region; `inputs` (and `outputs`, where known) say what it takes and
    gives."""
    region, nodes = region_of(module), list(module.graph.nodes)
    assert region is not None
    words = _words(module, region, outputs)
    names = Names(node.name for node in nodes if node.op == "get_attr")
    given = [node for node in nodes if node.op == "placeholder"]
    found = {node: names.take(word) for node, word in zip(given, inputs, strict=True)}
    for node in nodes:
        if node.op == "call_function":
            found[node] = names.take(words.get(node) or _word(node, found, words))
    return found


def _words(module: fx.GraphModule, region: Region, outputs: Sequence[str]) -> dict[fx.Node, str]:
    """The words this kind of region has for its values; the rest go by their operator."""
    result = output(module.graph).args[0]
    results: list[Any] = list(result) if isinstance(result, (list, tuple)) else [result]
    named = {node: word for node, word in zip(results, outputs, strict=False) if isinstance(node, fx.Node)}
    if region.kind == "attention":
        return {**_attention_words(module.graph), results[0]: "y"}
    if region.kind == "ffn":
        return {**_ffn_words(module, region), results[0]: "out"}
    return named


def _word(node: fx.Node, found: dict[fx.Node, str], words: dict[fx.Node, str]) -> str:
    """By operator: sizes `B` and `S` by what they are, views by what they view, the rest by its own name."""
    value, target = node.meta.get("val"), node.target
    if not isinstance(value, Tensor):
        return size_word(node)
    name = target._schema.name.split("::")[1].strip("_") if isinstance(target, torch._ops.OpOverload) else "v"
    if name in OWN_WORD:
        return OWN_WORD[name]
    source = node.args[0] if node.args else None
    if target in VIEWS and isinstance(source, fx.Node) and source.op == "call_function":
        return words.setdefault(node, words.get(source) or _word(source, found, words))
    return "mask" if value.dtype is torch.bool else name


def size_word(node: fx.Node) -> str:
    """`B` and `S` for the sizes of the tokens, `keep` … for the other numbers a graph computes."""
    if is_call(node, aten.sym_size.int) and node.args[1] in (0, 1):
        source = node.args[0]
        value = source.meta.get("val") if isinstance(source, fx.Node) else None
        if isinstance(value, Tensor) and value.dim() >= 2:
            return "BS"[int(node.args[1])]  # type: ignore[arg-type]
    if any(source.target == "training" for source in node.all_input_nodes):
        return "drop"
    value = node.meta.get("val")
    return "n" if isinstance(value, int | torch.SymInt) else "parts"


def _ffn_words(module: fx.GraphModule, region: Region) -> dict[fx.Node, str]:
    """Products by role where there are several, parts of a fused product likewise; everything else `h`."""
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    values = [node for node in calls if isinstance(node.meta.get("val"), Tensor)]
    words = {node: "h" for node in values if not is_call(node, aten.t.default)}
    roles = {weight: role for role, weight in region.roles.items()}
    several = len(roles) > 2
    for node in module.graph.nodes:
        if several and is_call(node, aten.linear.default):
            words[node] = roles.get(_weight(node), "h")
        elif isinstance(node.meta.get("val"), (list, tuple)) and len(node.users) == 2:
            words.update(_halves(node))
    return words


def _weight(product: fx.Node) -> str:
    value: Any = product.args[1]
    while value.op != "get_attr":
        value = value.args[0]
    return str(value.target)


def _halves(parts: fx.Node) -> dict[fx.Node, str]:
    """Of two halves that are multiplied, the one that is squashed first is the gate."""
    first, second = parts.users
    squashed = [half for half in (first, second) if _next_is_a_function(half)]
    if len(squashed) != 1:
        return {}
    return {half: "gate" if half is squashed[0] else "up" for half in (first, second)}


def _next_is_a_function(half: fx.Node) -> bool:
    tensors = [n for user in half.users for n in user.all_input_nodes if n.op != "get_attr"]
    return len(half.users) > 1 or tensors == [half]


def _attention_words(graph: fx.Graph) -> dict[fx.Node, str]:
    """`q`, `k`, `v` for what leads to one of the three alone, `qkv` and `kv` for what leads to several."""
    says = token_dependent(graph)
    words = {node: "h" for node in says if node.op == "call_function"}
    core = next((node for node in graph.nodes if _is_core(node)), None)
    if core is None:
        return words
    for node, letters in _sides(graph, _operands(core)).items():
        if node in says:
            words[node] = letters
    words.update(_after(core, says))
    return words


def _is_core(node: fx.Node) -> bool:
    return is_call(node, aten.scaled_dot_product_attention.default, aten.softmax.int)


def _operands(core: fx.Node) -> dict[fx.Node, str]:
    """The three values attention is made of, by letter."""
    if is_call(core, aten.scaled_dot_product_attention.default):
        return dict(zip(core.args[:3], "qkv", strict=True))  # type: ignore[arg-type]
    scores, mixed = _product_before(core), _product_after(core)
    pairs = [(scores.args[0], "q"), (scores.args[1], "k")] if scores is not None else []
    pairs += [(mixed.args[1], "v")] if mixed is not None else []
    return {node: letter for node, letter in pairs if isinstance(node, fx.Node)}


def _product_before(core: fx.Node) -> fx.Node | None:
    """The scores: the product a softmax's input comes from."""
    stack, seen = [core.args[0]], set[Any]()
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen or is_call(node, aten.linear.default):
            continue
        if node.target in PRODUCTS:
            return node
        seen.add(node)
        stack.extend(reversed(node.all_input_nodes))
    return None


def _product_after(core: fx.Node) -> fx.Node | None:
    """The product that probabilities are multiplied with values in."""
    node = core
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target in PRODUCTS:
            return node
    return None


def _sides(graph: fx.Graph, operands: dict[fx.Node, str]) -> dict[fx.Node, str]:
    """Every node that leads to an operand → the letters of all operands it leads to, in the order q, k, v."""
    sides: dict[fx.Node, set[str]] = {node: {letter} for node, letter in operands.items()}
    for node in reversed(graph.nodes):
        if node in sides and node.op == "call_function":
            for source in node.all_input_nodes:
                sides[source] = sides.get(source, set()) | sides[node]
    return {node: "".join(letter for letter in "qkv" if letter in found) for node, found in sides.items()}


def _after(core: fx.Node, says: set[fx.Node]) -> dict[fx.Node, str]:
    """`s` scores, `p` probabilities and `o` what the heads return."""
    if is_call(core, aten.scaled_dot_product_attention.default):
        return {node: "o" for node in says if node is core or _reads(node, core)}
    scores, mixed = _product_before(core), _product_after(core)
    words = {node: "s" for node in says if scores is not None and (node is scores or _reads(node, scores))}
    words |= {node: "p" for node in says if node is core or _reads(node, core)}
    return words | {
        node: "o" for node in says if mixed is not None and (node is mixed or _reads(node, mixed))
    }


def _reads(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` is computed from `source`."""
    stack, seen = list(node.all_input_nodes), set[fx.Node]()
    while stack:
        current = stack.pop()
        if current is source:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False
