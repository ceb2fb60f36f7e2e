"""Which values depend on token *values*, and which on *positions* (shapes) only.

A causal graph splits in two: masks, rotary tables, learned positions and ALiBi biases follow from the shape
of `tokens` alone; everything else carries what the tokens say.
"""

from __future__ import annotations

import torch
from torch import fx

from .graphs import placeholder

aten = torch.ops.aten

# Operators that read the shape or dtype of their input, never its values.
READS_SHAPE_ONLY = {
    aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int, aten.zeros_like.default,
    aten.ones_like.default, aten.full_like.default, aten.empty_like.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default, aten.new_empty.default, aten.rand_like.default,
}  # fmt: skip


def token_dependent(graph: fx.Graph, roots: set[fx.Node] | None = None) -> set[fx.Node]:
    """The nodes whose value depends on the values of `roots` (default: the tokens)."""
    found = set(roots) if roots is not None else {placeholder(graph)}
    for node in graph.nodes:
        if node.target not in READS_SHAPE_ONLY and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
