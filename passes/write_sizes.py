"""Write out the sizes that a reshape leaves to be inferred, where they are known.

before:  q = reshape(q, [B, S, -1, 8])
after:   q = reshape(q, [B, S, 12, 8])

A rank may have no sequences at all, and of nothing no size can be inferred.

Assumes: shapes are known (`propagate` ran).
Contract: exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from moec.ir import Pass, Program
from moec.ir.graphs import graph_modules
from moec.ir.patterns import is_call, tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class WriteSizes(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        for _, module in graph_modules(program.graph):
            changed = [node for node in module.graph.nodes if _write(node)]
            if changed:
                module.recompile()
        return program


def _write(node: fx.Node) -> bool:
    """Whether a size of `node` was written out."""
    if is_call(node, aten.reshape.default):
        position, first = 1, 0
    elif is_call(node, aten.unflatten.int):
        position, first = 2, _dim_of(node)
    else:
        return False
    sizes, value = list(node.args[position]), tensor(node)  # type: ignore[arg-type]
    if value is None or -1 not in [size for size in sizes if isinstance(size, int)]:
        return False
    place = next(i for i, size in enumerate(sizes) if isinstance(size, int) and size == -1)
    known = value.shape[first + place]
    if not isinstance(known, int):
        return False
    sizes[place] = known
    node.update_arg(position, sizes)
    return True


def _dim_of(node: fx.Node) -> int:
    source = tensor(node.args[0])
    assert source is not None
    dim = node.args[1]
    assert isinstance(dim, int)
    return dim % source.dim()
