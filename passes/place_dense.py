"""Deal the dense part out to the ranks of a tensor group, and say of each value where it lies.

before:  attention_0.q_proj.weight [96, 96]   whole on every rank
after:   attention_0.q_proj.weight [96, 96]   dim 0 over tensor; held alike along data
         attention_0.o_proj.weight [96, 96]   dim 1 over tensor; held alike along data
         wte.weight [50257, 96]               dim 0 over tensor; held alike along data

Attentions are dealt out by (groups of) heads, feed-forwards by hidden units, the embedding and the head by
words. What cannot be dealt out evenly, or shares a weight with something that needs it otherwise, stays
whole on every rank, and the ledger says why.

Assumes: `arrange_ranks` ran.
Contract: exact (the program still runs in one process, as it did).
Source:  Megatron-LM, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from moec.errors import PassError, PlanError
from moec.ir import Pass, Program, regions
from moec.ir.ledger import Ledger
from moec.ir.mesh import DATA, TENSOR
from moec.ir.patterns import is_call, tensor
from moec.ir.placement import Layout, Placement, Split

from .carry_ids import MixedError
from .channels import matrix_of
from .dense_sites import dense_sites, whole_shape
from .vocabulary_sites import head

aten = torch.ops.aten


@dataclass(frozen=True)
class PlaceDense(Pass):
    """See the module."""

    def requires(self, program: Program) -> None:
        if program.layout is None:
            raise PassError(self.name, "a program without a mesh", "arrange_ranks before it")
        ranks, heads = program.layout.mesh.tensor, num_heads(program.graph)
        if heads and ranks > heads:
            fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            found = f"tensor = {ranks} for {heads} attention heads"
            raise PlanError("[parallel] tensor", found, f"at most the number of heads: {fitting}")

    def apply(self, program: Program) -> Program:
        layout = program.layout
        assert layout is not None
        if layout.mesh.tensor == 1:
            return program
        sites, refused = dense_sites(program.graph, layout.mesh.tensor)
        placements, shapes = dict(layout.placements), dict(layout.shapes)
        for site in sites:
            for name, split in site.splits.items():
                placements[name] = Placement((split,), holders=DATA)
                shapes[name] = whole_shape(program.graph, name)
            for node, text in site.said.items():
                node.meta["placement"] = text
        program.layout = Layout(layout.mesh, placements, shapes)
        program.ledger = _noted(program.ledger, refused)
        return program


def num_heads(root: fx.GraphModule) -> int:
    """The largest number of heads of an attention, the most tensor ranks; 0 where there is none."""
    cores = [
        tensor(node.args[0])
        for module in regions(root, "attention").values()
        for node in module.graph.nodes
        if is_call(node, aten.scaled_dot_product_attention.default, aten.softmax.int)
    ]
    return max((v.shape[-3] for v in cores if v is not None and isinstance(v.shape[-3], int)), default=0)


def logits_split(program: Program) -> Split | None:
    """How the words of the logits lie on the ranks of a placed or partitioned program; None: whole."""
    layout = program.layout
    if layout is None or layout.mesh.tensor == 1:
        return None
    try:
        product, _ = head(program.graph)
    except MixedError:
        return None
    matrix, _ = matrix_of(program.graph, product)
    axis = layout.mesh.axis(TENSOR)
    return next((split for split in layout.of(str(matrix.target)).splits if split.axis == axis), None)


def tensor_weights(layout: Layout) -> set[str]:
    """Structural names of the weights that are dealt out to tensor ranks."""
    placed = layout.placements.items()
    return {name for name, placement in placed if any(split.axis == TENSOR for split in placement.splits)}


def _noted(ledger: Ledger, refused: dict[str, str]) -> Ledger:
    """One note for all that stay whole for the same reason."""
    names: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names.setdefault(reason, []).append(name)
    for reason, alike in names.items():
        shown = ", ".join(alike[:3]) + (f" and {len(alike) - 3} more" if len(alike) > 3 else "")
        ledger = ledger.note(f"whole on every tensor rank: {shown}: {reason}")
    return ledger
