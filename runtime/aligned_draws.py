"""Random numbers of the ranks of a tensor group: the same ones wherever they compute the same values.

Ranks of one tensor group hold the same tokens, so dropout must draw the same mask on each of them. Expert
layers are where they part: rows that arrive, or a rank's share of the tokens, differ in number, and what is
drawn for them moves the generators apart. So such a layer draws from where the ranks stand, and afterwards
all of them go on from one seed that they drew before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from moec.ir import regions
from moec.ir.mesh import Mesh
from moec.ir.patterns import argument, is_call

aten, ops = torch.ops.aten, torch.ops.moec
SEED = "_seed_after"


def align_draws(root: fx.GraphModule, mesh: Mesh) -> None:
    """Let the expert layers of a partitioned program that draw numbers leave the generators of a tensor group
    alike, in place. Nothing is done where a tensor group is one rank, or a layer draws nothing."""
    if mesh.tensor == 1:
        return
    for kind in ("dispatch", "moe"):
        for module in regions(root, kind).values():
            if any(map(_draws, module.graph.nodes)):
                module.register_forward_pre_hook(_draw_seed)
                module.register_forward_hook(_go_on)


def _draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers while training."""
    if is_call(node, aten.dropout.default):
        return bool(argument(node, 1, "p"))
    if is_call(node, ops.route.default):
        return argument(node, 4, "noise") != "none"
    if is_call(node, ops.gate.default):
        return argument(node, 5, "noise") != "none" or bool(argument(node, 9, "random"))
    if is_call(node, ops.admit.default, ops.assign.default):
        return bool(argument(node, len(node.args) - 2, "random"))
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in node.target.tags
    )


def _draw_seed(module: nn.Module, _: Any) -> None:
    if module.training:
        module.__dict__[SEED] = int(torch.randint(2**62, ()))


def _go_on(module: nn.Module, _: Any, __: Any) -> None:
    if module.training:
        torch.manual_seed(module.__dict__.pop(SEED))
