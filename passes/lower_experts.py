"""Let rows travel to their experts: every expert layer as one rank computes it.

before:  rows = moec.dispatch(tokens, order, K)
         h = moec.grouped_linear(rows, up, bias, counts)
         …
         sums = moec.combine(out, weights, order, counts)
after:   rows = moec.dispatch(tokens, order, K)
         arriving = all_to_all of counts over expert_4          # how many rows come from each rank
         received = moec.exchange(rows, sent, got, "expert_4")   # the rows, by sender
         by_expert = moec.regroup(received, arriving)           # the rows, by expert
         h = moec.grouped_linear(by_expert, up, bias, here)
         …
         by_sender = moec.regroup(out, arriving.t())
         returned = moec.exchange(by_sender, got, sent, "expert_4", num_rows)
         sums = moec.combine(returned, weights, order, counts)

With slices, the ranks that share experts first gather their rows and at last add up their parts. Over several
nodes the exchange takes two steps, inside the node and then between nodes (`hierarchical`). With shares, a
tensor rank does all this for its own stretch of the tokens, and the answers are gathered (`coordinated`).
Capacity, balance and z loss and counts are those of all ranks' tokens together (see `ops/admit.py`).

Assumes: regions `moe_*` as `lift_experts` writes them.
Contract: exact, for the sum over all ranks.
Source:  DeepSpeed-MoE, sections 5.2 and 5.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Pass, Program, regions
from moec.ir.local import hold_parts

from .travel import lower_expert_layer


@dataclass(frozen=True)
class LowerExperts(Pass):
    """See the module. `rank`: whose program it becomes; only the weights depend on it."""

    rank: int

    def apply(self, program: Program) -> Program:
        layout = program.layout
        assert layout is not None
        layers = regions(program.graph, "moe")
        for name, module in layers.items():
            lower_expert_layer(module, layout.mesh, layout.mesh.axes_of(name))
        held = {name for name in layout.placements if name.partition(".")[0] in layers}
        hold_parts(program.graph, layout, self.rank, held)
        return program
