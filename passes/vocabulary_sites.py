"""The two places where a program reads its whole vocabulary: the embedding of tokens, and the head.

A head is the product whose features are the words of the logits: between it and the output stand pointwise
operators alone, which treat every word alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from moec.ir.graphs import output, placeholder, weight_of
from moec.ir.patterns import argument, is_call, tensor

from .carry_ids import MixedError, is_pointwise
from .channels import arguments_of, matrix_of

aten = torch.ops.aten


def embeddings(root: fx.GraphModule) -> Iterator[fx.Node]:
    """The embeddings of the tokens themselves, by a weight of the root graph."""
    tokens = placeholder(root.graph)
    for node in root.graph.nodes:
        if is_call(node, aten.embedding.default) and node.args[1] is tokens:
            yield node


def require_plain(root: fx.GraphModule, node: fx.Node) -> None:
    """Raise `MixedError` where the embedding does more than look rows up."""
    if weight_of(root, node.args[0]) is None:  # type: ignore[arg-type]
        raise MixedError(f"the weight of `{node.name}` is computed")
    if argument(node, 3, "scale_grad_by_freq", False) or argument(node, 4, "sparse", False):
        raise MixedError(f"`{node.name}` scales its gradient, or keeps it sparse")


def padding_of(node: fx.Node) -> int:
    """The word that an embedding does not learn; -1 when there is none."""
    return int(argument(node, 2, "padding_idx", -1))


def logits_of(root: fx.GraphModule) -> fx.Node:
    """The node of the logits, first of what a root graph returns."""
    returned: Any = output(root.graph).args[0]
    return returned[0] if isinstance(returned, tuple | list) else returned


def head(root: fx.GraphModule) -> tuple[fx.Node, list[fx.Node]]:
    """The head, and the pointwise calls from it to the logits, those included.

    Raises `MixedError`, saying why, when the words cannot be told apart behind the last product.
    """
    logits = logits_of(root)
    tail: list[fx.Node] = []
    node = logits
    while not is_call(node, aten.linear.default):
        tail.insert(0, node)
        node = _from_words(node)
    matrix_of(root, node)
    bias = arguments_of(node, lambda n: n).get("bias")
    if bias is not None and weight_of(root, bias) is None:
        raise MixedError(f"the bias of `{node.name}` is computed")
    _require_closed(root, [node, *tail], logits)
    return node, tail


def _from_words(node: fx.Node) -> fx.Node:
    """The operand of a pointwise call that has the words; all others are the same for every word."""
    made = tensor(node)
    if made is None or node.op != "call_function" or not is_pointwise(node.target):
        raise MixedError(f"`{node.name}` stands between the head and the logits")
    words = []
    for operand in node.all_input_nodes:
        value = tensor(operand)
        if value is not None and value.dim() and value.shape[-1] != 1:
            words.append(operand)
    if len(words) != 1 or tensor(words[0]).shape[-1] != made.shape[-1]:  # type: ignore[union-attr]
        raise MixedError(f"`{node.name}`, behind the head, reads another value for each word")
    return words[0]


def _require_closed(root: fx.GraphModule, chain: list[fx.Node], logits: fx.Node) -> None:
    end = output(root.graph)
    for node, follower in zip(chain, [*chain[1:], end], strict=True):
        others = [user for user in node.users if user is not follower]
        if others:
            raise MixedError(f"`{node.name}`, behind the head, is also read by `{others[0].name}`")
