"""Spell out the dense part as one tensor rank computes it.

before:  q = linear(x, self.q_proj.weight)                     # [B, S, 96]
         q_1 = unflatten(q, -1, [12, 8])
         …
         y = linear(o, self.o_proj.weight, self.o_proj.bias)
after:   q = linear(x, self.q_proj.weight)                     # [B, S, 48], this rank's heads
         q_1 = unflatten(q, -1, [6, 8])
         …
         part = linear(o, self.o_proj.weight)
         reduced = all_reduce(part, "sum", "tensor");  whole = wait_tensor(reduced)
         y = whole + self.o_proj.bias

The embedding looks up this rank's words and adds up; the logits stay parts, [B, S, V / tensor].

Assumes: `place_dense` ran.
Contract: exact, for the sum over all ranks.
Source:  Megatron-LM, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.errors import PassError
from moec.ir import Pass, Program
from moec.ir.graphs import drop_unused
from moec.ir.identity import made_from
from moec.ir.local import hold_parts
from moec.ir.mesh import TENSOR
from moec.ir.placement import Layout

from .channels import arguments_of
from .deal_channels import Deal, Part
from .deal_regions import deal_regions, dense_regions
from .local_sizes import Fraction
from .place_dense import tensor_weights
from .vocabulary_sites import embeddings, padding_of

aten = torch.ops.aten
moec_ops = torch.ops.moec
c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class LowerDense(Pass):
    """See the module. `rank`: whose program it becomes; only the weights depend on it."""

    rank: int

    def apply(self, program: Program) -> Program:
        layout = program.layout
        assert layout is not None
        held = tensor_weights(layout)
        if layout.mesh.tensor == 1 or not held:
            return program
        found = deal_regions(program.graph, layout.mesh.tensor)
        for name, module in dense_regions(program.graph).items():
            if any(weight.startswith(f"{name}.") for weight in held):
                _lower_region(name, module, found[name])
        _lower_embeddings(program.graph, layout)
        hold_parts(program.graph, layout, self.rank, held)
        return program


def _lower_region(name: str, module: fx.GraphModule, found: Deal | str) -> None:
    if isinstance(found, str):
        raise PassError(f"lower_dense: {name}", found, "the region that place_dense dealt out")
    for node, changed in found.arguments.items():
        _change(node, changed)
    for user, parts in _by_user(found).items():
        _take_parts(user, parts, found.ranks)
    for node, text in found.placements.items():
        node.meta["placement"] = text
    _add_up(next(iter(reversed(module.graph.nodes))).args[0])
    drop_unused(module)


def _change(node: fx.Node, changed: Mapping[str, Any]) -> None:
    """Give a call other arguments, by the names of its schema; free sizes are divided beforehand."""
    schema = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    with node.graph.inserting_before(node):
        for name, value in changed.items():
            local = [_divided(item) for item in value] if isinstance(value, list) else value
            position = schema.index(name)
            if position < len(node.args):
                node.update_arg(position, local)
            else:
                node.update_kwarg(name, local)


def _divided(size: Any) -> Any:
    """A size, or a call that divides a free size by the number of ranks, at the graph's insert point."""
    if not isinstance(size, Fraction):
        return size
    return size.size.graph.call_function(operator.floordiv, (size.size, size.ranks))


def _by_user(found: Deal) -> dict[fx.Node, list[Part]]:
    users: dict[fx.Node, list[Part]] = {}
    for part in found.parts:
        users.setdefault(part.user, []).append(part)
    return users


def _take_parts(user: fx.Node, parts: list[Part], ranks: int) -> None:
    """Let `user` read this rank's part of operands that no channel makes."""
    current: dict[fx.Node, fx.Node] = {}
    for part in parts:
        operand = current.get(part.operand, part.operand)
        with user.graph.inserting_before(user):
            taken = user.graph.call_function(
                moec_ops.part.default, (operand, part.dim, list(part.blocks), ranks, TENSOR)
            )
        taken.name = f"{part.operand.name}_part"
        made_from(taken, user).meta["placement"] = f"dim {part.dim} over {TENSOR}"
        current[part.operand] = taken
    for operand, taken in current.items():
        user.replace_input_with(operand, taken)


def _add_up(product: Any) -> None:
    """The last product gives a part of a sum: add up over the ranks, then the bias, which all ranks have."""
    bias = arguments_of(product, lambda n: n).get("bias")
    product.args, product.kwargs = product.args[:2], {}
    whole = _summed(product)
    if bias is not None:
        with product.graph.inserting_after(whole):
            total = product.graph.call_function(aten.add.Tensor, (whole, bias))
        made_from(total, product)
        whole.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        whole.name, whole = f"{product.name}_whole", total
    name, product.name = product.name, f"{product.name}_part"
    whole.name = name


def _summed(part: fx.Node) -> fx.Node:
    """all_reduce and wait behind `part`; all who read it read the sum."""
    graph = part.graph
    with graph.inserting_after(part):
        reduced = graph.call_function(c10d.all_reduce.default, (part, "sum", TENSOR))
    with graph.inserting_after(reduced):
        whole = graph.call_function(c10d.wait_tensor.default, (reduced,))
    part.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not reduced)
    reduced.name = f"{part.name}_sum"
    made_from(reduced, part)
    return made_from(whole, part)


def _lower_embeddings(root: fx.GraphModule, layout: Layout) -> None:
    """Look up this rank's words, and add up over the ranks."""
    for node in list(embeddings(root)):
        weight, tokens = node.args[:2]
        name = str(weight.target)  # type: ignore[union-attr]
        if layout.of(name).splits:
            words, padding = layout.shapes[name][0], padding_of(node)
            node.args = (tokens, weight, words, TENSOR, *([padding] if padding != -1 else []))
            node.target, node.kwargs = moec_ops.embedding_part.default, {}
            name = node.name
            whole = _summed(node)
            whole.name, node.name = name, f"{name}_part"
    root.recompile()
