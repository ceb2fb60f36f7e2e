"""Multiply once with the weights of all products that read the same value.

before:  q = linear(x, self.q.weight, None)
         k = linear(x, self.k.weight, None)
         v = linear(x, self.v.weight, None)
after:   q_k_v = linear(x, self.q_k_v.weight, None)
         q, k, v = split_with_sizes(q_k_v, [64, 16, 16], dim=-1)

The rows of the joined weight *are* the weights it is made of: they are moved into one block of memory, and
the parameters become views of it, in the program this one was derived from too. So nothing is held twice, and
what training writes is seen here. For a decoder alone: joined, parameters have no gradients of their own.

Assumes: stage *cached*; a program whose weights are loaded.
Contract: exact.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moec.ir import Check, Pass, Program
from moec.ir.graphs import drop_unused, graph_modules, place, weight_of
from moec.ir.identity import made_from
from moec.ir.patterns import arguments_of, is_call
from moec.runtime.ops.packed import PACKED

from .fusion_notes import DeclinedError, note_fusions
from .prove_fusion import prove_fusion

aten = torch.ops.aten
ALIGNMENT = 64  # bytes: how torch aligns memory
Joined = dict[tuple[int, ...], Tensor]


@dataclass(frozen=True)
class FuseQkv(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        findings, joined = [], Joined()
        for name, module in graph_modules(program.graph):
            for products in _groups(module):
                told = ", ".join(node.name for node in products)
                try:
                    _fuse(module, products, joined)
                    findings.append((name or "root", f"{told} in one product"))
                except DeclinedError as reason:
                    findings.append((name or "root", f"{told} stay apart: {reason}"))
            drop_unused(module)
        note_fusions(program, self.name, dict.fromkeys(findings))
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """A step gives what it gave."""
        return prove_fusion(before, after)


def _groups(module: fx.GraphModule) -> list[list[fx.Node]]:
    """Products that read the same value, two at least, in graph order."""
    by_input: dict[object, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if is_call(node, aten.linear.default):
            by_input.setdefault(node.args[0], []).append(node)
    return [products for products in by_input.values() if len(products) > 1]


def _fuse(module: fx.GraphModule, products: list[fx.Node], joined: Joined) -> None:
    arguments = [arguments_of(node) for node in products]
    weights = [_weight(module, given[1]) for given in arguments]
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        raise DeclinedError("their weights have several dtypes")
    biases = [None if given[2] is None else _weight(module, given[2]) for given in arguments]
    if len({bias is None for bias in biases}) > 1:
        raise DeclinedError("some have a bias and some have none")
    name = _free_name(module, [str(given[1].target) for given in arguments])
    graph, first = module.graph, products[0]
    with graph.inserting_before(first):
        inputs = [arguments[0][0], _placed(module, f"{name}.weight", _join(weights, joined))]
        there = [bias for bias in biases if bias is not None]
        inputs.append(_placed(module, f"{name}.bias", _join(there, joined)) if there else None)
        product = graph.call_function(aten.linear.default, tuple(inputs))
        sizes = [weight.shape[0] for weight in weights]
        parts = graph.call_function(aten.split_with_sizes.default, (product, sizes, -1))
        items = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(products))]
    product.name = graph._graph_namespace.create_name(name, None)
    for node, item in zip(products, items, strict=True):
        _stand_in(node, item)
    for node in (product, parts):
        made_from(node, *items)


def _weight(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The parameter that a product reads, which must be nobody else's in this graph."""
    value = weight_of(module, node)
    if value is None:
        raise DeclinedError(f"`{node.name}` is computed")
    if value.is_meta or not value.is_contiguous():
        raise DeclinedError(f"`{node.target}` is not in memory as it reads")
    if value.nbytes % ALIGNMENT:
        # What lies behind it would begin elsewhere, and products may then differ in the last bit.
        raise DeclinedError(f"`{node.target}` has {value.nbytes} bytes, not a multiple of {ALIGNMENT}")
    readers = [n for n in module.graph.nodes if n.op == "get_attr" and n.target == node.target]
    if sum(len(reader.users) for reader in readers) > 1:
        raise DeclinedError(f"`{node.target}` is read in several places")
    return value


def _free_name(module: fx.GraphModule, targets: list[str]) -> str:
    """`q_k_v` for `attn.q.weight`, `attn.k.weight`, `attn.v.weight`, where nothing has that name."""
    name = "_".join((["weights", *target.split(".")[:-1]])[-1] for target in targets)
    while hasattr(module, name):
        name += "_"
    return name


def _placed(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    place(module, name, value, persistent=False)
    return module.graph.get_attr(name)


def _stand_in(node: fx.Node, item: fx.Node) -> None:
    name = node.name
    made_from(item, node)
    node.replace_all_uses_with(item, propagate_meta=False)
    node.graph.erase_node(node)
    item.name = name


# memory


def _join(tensors: Sequence[Tensor], joined: Joined) -> Tensor:
    """One tensor whose rows are those of `tensors`, which become views of it; known ones are used again."""
    key = tuple(id(tensor) for tensor in tensors)
    if key not in joined:
        joined[key] = _lying_together(tensors) if _lie_together(tensors) else _moved_together(tensors)
        PACKED.consists_of(joined[key], tensors)
    return joined[key]


def _lie_together(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors follow each other in one block of memory, as an earlier decoder left them."""
    storage = tensors[0].untyped_storage().data_ptr()
    ends = [tensor.storage_offset() + tensor.numel() for tensor in tensors]
    starts = [tensor.storage_offset() for tensor in tensors]
    return starts[1:] == ends[:-1] and all(t.untyped_storage().data_ptr() == storage for t in tensors)


def _lying_together(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0].detach()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _moved_together(tensors: Sequence[Tensor]) -> Tensor:
    whole = torch.cat([tensor.detach() for tensor in tensors])
    parts = whole.split([tensor.shape[0] for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part
    return whole
