"""How the experts of a layer are cut into slices, each a part of the hidden units of every expert.

before:  out = grouped_linear(gelu(grouped_linear(rows, up)), down)
after:   out_r = grouped_linear(gelu(grouped_linear(rows, up[:, r-th part])), down[:, :, r-th part])
         out = sum of out_r over the ranks of a slice group

Assumes: between the up products and the down product stand pointwise operators and halvings, so each output
of an up product belongs to one hidden unit. Which one is found by evaluation (see `hidden_units.py`).
Source:  DeepSpeed-MoE, section 5.2, expert-slicing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.errors import PlanError
from moec.ir.graphs import weight_of
from moec.ir.patterns import argument, is_call, tensor

from .hidden_units import WHOLE_DIM, blocks_of, evaluate, units_of_rows

aten = torch.ops.aten
GROUPED = torch.ops.moec.grouped_linear.default

Cuts = dict[str, tuple[int, tuple[int, ...]]]


def slices_of(module: fx.GraphModule, ways: int, where: str) -> tuple[Cuts, str]:
    """Weight of the expert layer → (its dim, the blocks of that dim) that `ways` slices are cut along.

    The second value says why the layer cannot be cut by its structure, or is empty. Raises `PlanError`, with
    the numbers that would do, when `ways` does not divide the hidden size.
    """
    products = [node for node in module.graph.nodes if is_call(node, GROUPED)]
    down, ups = products[-1], products[:-1]
    hidden = int(tensor(down.args[0]).shape[-1])  # type: ignore[union-attr]
    if hidden % ways:
        fitting = ", ".join(str(d) for d in range(1, hidden + 1) if hidden % d == 0)
        found = f"slice = {ways} of experts with {hidden} hidden units"
        raise PlanError(f"[parallel], {where}", found, f"a number that divides {hidden}: {fitting}")
    reason = _obstacle(module, ups, down, ways)
    if reason:
        return {}, reason
    widths = [int(tensor(up).shape[-1]) for up in ups]  # type: ignore[union-attr]
    units = units_of_rows(_inner(module, ups, down), widths, hidden)
    blocks = [blocks_of(u, hidden) for u in units] if units is not None else [None]
    if any(b is None for b in blocks):
        return {}, "hidden units that are not laid out in order"
    cuts: Cuts = {str(_weight(down, 1).target): (2, (hidden,))}
    for up, width, times in zip(ups, widths, blocks, strict=True):
        assert times is not None
        lengths = (width // times,) * times
        cuts[str(_weight(up, 1).target)] = (1, lengths)
        if up.args[2] is not None:
            cuts[str(_weight(up, 2).target)] = (1, lengths)
    return cuts, ""


def _weight(product: fx.Node, position: int) -> fx.Node:
    node = product.args[position]
    assert isinstance(node, fx.Node)
    return node


def between(module: fx.GraphModule, down: fx.Node) -> list[fx.Node]:
    """The nodes that compute the input of `down` from the up products, weights included, in order."""
    found: set[fx.Node] = set()
    waiting = [down.args[0]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, fx.Node) and node not in found and not is_call(node, GROUPED):
            found.add(node)
            waiting += node.all_input_nodes
    return [node for node in module.graph.nodes if node in found]


def _obstacle(module: fx.GraphModule, ups: list[fx.Node], down: fx.Node, ways: int) -> str:
    if not ups:
        return "a single product an expert"
    for node in between(module, down):
        value = weight_of(module, node)
        if value is not None and value.numel() > 1:
            return f"{node.target} holds a weight for each hidden unit, the same for all experts"
        if node.op == "placeholder":
            return "an expert that reads its input beside its products"
        sizes = any(isinstance(a, list | tuple) for a in node.args[1:])
        cuts = is_call(node, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default)
        if cuts and not _divides(node, ways):
            return f"{node.name} cuts the hidden units in places that no slice has"
        if node.op == "call_function" and sizes and not is_call(node, aten.split_with_sizes.default):
            return f"{node.name} fixes the hidden size"
    return ""


def _inner(module: fx.GraphModule, ups: list[fx.Node], down: fx.Node) -> Any:
    """Outputs of the up products → input of the down product, in fp64."""
    nodes = between(module, down)

    def inner(values: list[Tensor]) -> Tensor:
        env: dict[fx.Node, Any] = dict(zip(ups, values, strict=True))
        for node in nodes:
            env[node] = evaluate(module, node, env)
        made: Tensor = env[down.args[0]]  # type: ignore[index]
        return made

    return inner


def shorten(node: fx.Node, ways: int) -> None:
    """Divide the sizes that `node` cuts the hidden units by, in place: ends of slices, lengths of splits."""
    if is_call(node, aten.split_with_sizes.default):
        node.args = (node.args[0], [int(size) // ways for size in node.args[1]], *node.args[2:])  # type: ignore[union-attr, arg-type]
    elif is_call(node, aten.split.Tensor):
        node.args = (node.args[0], int(node.args[1]) // ways, *node.args[2:])  # type: ignore[arg-type]
    elif is_call(node, aten.slice.Tensor) and node.args[1] in (-1, 1):
        start, end = bounds_of(node)
        start = start if step_of(node) > 1 else start // ways  # every second one, from the second: 1
        node.args = (*node.args[:2], start, end if end >= WHOLE_DIM else end // ways, *node.args[4:])


def bounds_of(node: fx.Node) -> tuple[int, int]:
    """Where a slice starts and ends; WHOLE_DIM and beyond for one without an end."""
    start, end = argument(node, 2, "start"), argument(node, 3, "end")
    return start or 0, WHOLE_DIM if end is None else end


def step_of(node: fx.Node) -> int:
    """The step of a slice."""
    step: int = argument(node, 4, "step", 1)
    return step


def _divides(node: fx.Node, ways: int) -> bool:
    """Whether the sizes that `node` cuts the hidden units by are those of `ways` equal parts."""
    if is_call(node, aten.split_with_sizes.default):
        return all(int(size) % ways == 0 for size in node.args[1])  # type: ignore[union-attr, arg-type]
    if is_call(node, aten.split.Tensor):
        return int(node.args[1]) % ways == 0  # type: ignore[arg-type]
    start, end = bounds_of(node)
    starts = 0 <= start < step_of(node) or start % ways == 0
    return starts and (end >= WHOLE_DIM or (end > 0 and end % ways == 0))
