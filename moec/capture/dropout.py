"""Dropout that follows `train()` and `eval()` again.

An exported graph carries dropout with its training flag baked in. Here the flag becomes `self.training`.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from moec.ir.graphs import training_flag

aten = torch.ops.aten


def follow_training(graph: fx.Graph) -> None:
    """Rewire every dropout and attention dropout of `graph` to the `training` flag, in place."""
    for node in list(graph.nodes):
        if node.target in (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default):
            node.update_arg(2, training_flag(graph))
        elif node.target is aten.scaled_dot_product_attention.default:
            _attention(graph, node)


def _attention(graph: fx.Graph, node: fx.Node) -> None:
    """`dropout_p` of attention becomes `training * p`: p while training, 0 otherwise."""
    position = 4
    probability = node.args[position] if len(node.args) > position else node.kwargs.get("dropout_p", 0.0)
    if not isinstance(probability, float) or probability == 0.0:
        return
    flag = training_flag(graph)
    with graph.inserting_before(node):
        scaled = graph.call_function(operator.mul, (flag, probability))
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "dropout_p"}
    node.args = (*node.args[:3], *(None,) * (3 - len(node.args)), *node.args[3:])
    if len(node.args) == 3:
        node.args = (*node.args, None)
    node.args = (*node.args[:4], scaled, *node.args[5:])
