"""Run the graph before a pass with something dumb in place of some regions, and compare the graph after
with it.

What a pass does to a region can be said in a few plain lines (one token at a time; two branches added
up). The rest of the graph, before the pass, is run as it stands: so a rewrite that is right by itself but
sits in the wrong place, reads the wrong value or is added twice is seen as well, whatever the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moec.ir import Check, Program
from moec.ir.compare import EXACT, error_of, gradients_of, worst_gradient
from moec.ir.retarget import in_dtype

from .runner import proof_tokens

StandIn = Callable[[fx.GraphModule, Tensor], Tensor]
"""(the region as it was, its input) → its output."""


@dataclass
class Pair:
    """The graphs before and after a pass, in fp64 and evaluation mode, on the same leaves: a weight that
    both have is one tensor, so a change to it is seen by both."""

    before: fx.GraphModule
    after: fx.GraphModule
    tokens: Tensor

    @staticmethod
    def of(before: Program, after: Program) -> Pair:
        """Copies of both graphs; the programs are left alone."""
        table: dict[int, Tensor] = {}
        old, new = (in_dtype(p.graph, torch.float64, table).eval() for p in (before, after))
        for value in [*old.parameters(), *new.parameters()]:
            value.requires_grad_(True)
        return Pair(old, new, proof_tokens(before))

    def checks(self, what: str, stand_ins: Mapping[str, StandIn]) -> list[Check]:
        """Logits, and the gradient of every parameter of the graph after."""
        needed = ByHand(self.before, stand_ins).run(self.tokens)
        found = self.after(self.tokens)
        leaves = dict(self.after.named_parameters())
        right, left = (gradients_of({"logits": logits}, leaves) for logits in (needed, found))
        error, worst = worst_gradient(right, left)
        return [
            Check(f"logits against {what}", error_of(found.detach(), needed.detach()), EXACT),
            Check(f"gradients against {what}", error, EXACT, worst=worst),
        ]


class ByHand(fx.Interpreter):
    """Runs a graph, calling stand-ins in place of the regions they are named for; `seen` keeps what
    regions gave."""

    def __init__(self, module: fx.GraphModule, stand_ins: Mapping[str, StandIn]) -> None:
        super().__init__(module)
        self.stand_ins, self.seen = stand_ins, dict[str, Any]()

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The stand-in where there is one, otherwise the region itself."""
        stand_in = self.stand_ins.get(str(target))
        if stand_in is None:
            self.seen[str(target)] = super().call_module(target, args, kwargs)
        else:
            self.seen[str(target)] = stand_in(region_in(self.module, str(target)), args[0])
        return self.seen[str(target)]


def region_in(root: nn.Module, name: str) -> fx.GraphModule:
    """The region `name` of a root graph."""
    region = root.get_submodule(name)
    assert isinstance(region, fx.GraphModule)
    return region


def randomise(module: fx.GraphModule) -> None:
    """Random weights in place, scaled by their width, so that no two experts or branches are alike."""
    generator = torch.Generator().manual_seed(3)
    for value in [*module.parameters(), *module.buffers()]:
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            width = value.shape[-1] if value.dim() else 1
            value.data = (drawn / max(1.0, width**0.5)).to(value.device)
    for value in module.parameters():
        value.requires_grad_(True)
