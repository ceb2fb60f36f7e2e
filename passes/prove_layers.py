"""The proof of a student: its teacher, run by hand with the kept layers only.

The teacher's graph is run node by node, as it was; where a layer that is left out would give its result,
what it read is handed on in its place. Neither the student's graph nor its names play a part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import Check, Program, region_of
from moec.ir.compare import EXACT, error_of, gradients_of, worst_gradient
from moec.ir.graphs import named_weights
from moec.plan import LayerSettings

from .blocks import Block, blocks_of
from .by_hand import Pair
from .residual_stream import logits_of


def prove_layers(before: Program, after: Program, keep: Sequence[int]) -> list[Check]:
    """Logits, loss terms, every gradient, and that each weight is the teacher's of the name it tells."""
    if any(p.is_meta for p in after.parameters()):
        return []
    pair = Pair.of(before, after)
    by_hand = _KeptLayers(pair.before, blocks_of(before.graph), set(keep))
    by_hand.run(pair.tokens)
    needed = by_hand.answer()
    out = pair.after(pair.tokens)
    found = _flat(out)
    leaves = dict(pair.after.named_parameters())
    right, left = (gradients_of(_differentiable(side), leaves) for side in (needed, found))
    error, worst = worst_gradient(right, left)
    checks = [_values(name, needed, found) for name in needed]
    return [
        *checks,
        Check("gradients against the kept layers", error, EXACT, worst=worst),
        _weights(before, after),
    ]


def _values(name: str, needed: dict[str, Tensor], found: dict[str, Tensor]) -> Check:
    error = error_of(found[name].detach(), needed[name].detach()) if name in found else float("inf")
    return Check(f"{name} against the kept layers", error, EXACT)


def _differentiable(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if value.is_floating_point()}


def _flat(out: Any) -> dict[str, Tensor]:
    """Logits, and the loss terms where there are any."""
    if isinstance(out, Tensor):
        return {"logits": out}
    logits, terms = out
    return {"logits": logits, "balance": terms["balance"], "z": terms["z"]}


class _KeptLayers(fx.Interpreter):
    """Runs the teacher's graph; the exit of a layer that is not kept is what the layer read."""

    def __init__(self, root: fx.GraphModule, blocks: Sequence[Block], keep: set[int]) -> None:
        super().__init__(root, garbage_collect_values=False)
        self.kept = [block for block in blocks if block.index in keep]
        self.skipped = {block.exit.name: block.entry.name for block in blocks if block.index not in keep}
        self.by_name = {node.name: node for node in root.graph.nodes}
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As of the interpreter, but for the exits of layers that are left out."""
        if n.name in self.skipped:
            return self.env[self.by_name[self.skipped[n.name]]]
        result = super().run_node(n)
        if n.op == "call_module":
            self.seen[str(n.target)] = result
        return result

    def answer(self) -> dict[str, Tensor]:
        """Logits, and the terms of the expert layers that stay, by the plan's weights."""
        assert isinstance(self.module, fx.GraphModule)
        found = {"logits": self.env[logits_of(self.module.graph)]}
        layers = [n for b in self.kept for n in b.regions if self._settings(n) is not None]
        for position, term in ((1, "balance"), (2, "z")) if layers else ():
            found[term] = torch.zeros((), dtype=torch.float64)
            for name in layers:
                settings = self._settings(name)
                assert settings is not None
                weight = settings.balance_weight if term == "balance" else settings.z_loss
                found[term] = found[term] + weight * self.seen[name][position].cpu()
        return found

    def _settings(self, name: str) -> LayerSettings | None:
        region = region_of(self.submodules[name])
        if region is None or region.kind != "moe":
            return None
        known = {k: v for k, v in region.settings.items() if k in LayerSettings.model_fields}
        return LayerSettings(**known)


def _weights(before: Program, after: Program) -> Check:
    """Every weight is the very tensor that the teacher has under the name its origin tells."""
    known = {before.origins.public_name(name): value for name, value in named_weights(before.graph)}
    wrong = [
        name
        for name, value in named_weights(after.graph)
        if name in after.origins and known.get(after.origins[name].teacher) is not value
    ]
    return Check("weights", float(len(wrong)), 0.0, "", wrong[0] if wrong else "")
