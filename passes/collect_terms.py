"""Gather the loss terms and loads of all expert layers into the program's output.

before:  return logits
after:   balance = 0.01 * balance_1 + 0.01 * balance_3
         return logits, {"balance": balance, "z": …, "counts": {"moe_1": counts_1, …}}

Weights of the terms are the plan's, layer by layer. A program without expert layers is left alone.

Assumes: expert layers are regions `moe_*` that return (y, balance, z, counts).
Contract: exact (the logits are untouched).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from moec.ir import Check, Pass, Program, region_of, regions
from moec.ir.compare import EXACT, error_of, gradients_of, worst_gradient
from moec.ir.graphs import output
from moec.plan import LayerSettings

from .by_hand import ByHand, Pair

aten = torch.ops.aten


@dataclass(frozen=True)
class CollectTerms(Pass):
    """See the module."""

    makes: ClassVar[str] = "sparse"

    def apply(self, program: Program) -> Program:
        collect_terms(program.graph)
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """The terms against the plan's weights times what each expert layer gives; values and gradients."""
        layers = regions(before.graph, "moe")
        if not layers or any(p.is_meta for p in after.parameters()):
            return []
        pair = Pair.of(before, after)
        by_hand = ByHand(pair.before, {})
        by_hand.run(pair.tokens)
        needed = _terms_by_hand(layers, by_hand.seen)
        found = pair.after(pair.tokens)[1]
        return _term_checks(pair, layers, by_hand.seen, needed, found)


def _terms_by_hand(layers: Mapping[str, fx.GraphModule], seen: Mapping[str, Any]) -> dict[str, Tensor]:
    totals = {"balance": torch.zeros((), dtype=torch.float64), "z": torch.zeros((), dtype=torch.float64)}
    for name, module in layers.items():
        region = region_of(module)
        assert region is not None
        known = {k: v for k, v in region.settings.items() if k in LayerSettings.model_fields}
        settings, (_, balance, z, _) = LayerSettings(**known), seen[name]
        totals["balance"] = totals["balance"] + settings.balance_weight * balance.cpu()
        totals["z"] = totals["z"] + settings.z_loss * z.cpu()
    return totals


def _term_checks(
    pair: Pair,
    layers: Mapping[str, fx.GraphModule],
    seen: Mapping[str, Any],
    needed: dict[str, Tensor],
    found: Mapping[str, Any],
) -> list[Check]:
    terms = {name: found[name] for name in needed}
    checks = [
        Check(f"{name} term", error_of(terms[name].detach().cpu(), needed[name].detach()), EXACT)
        for name in needed
    ]
    if any(value.requires_grad for value in needed.values()):
        leaves = dict(pair.after.named_parameters())
        error, worst = worst_gradient(gradients_of(needed, leaves), gradients_of(terms, leaves))
        checks.append(Check("gradients of the terms", error, EXACT, worst=worst))
    same = list(found["counts"]) == list(layers)
    wrong = [n for n in layers if not same or not torch.equal(found["counts"][n], seen[n][3])]
    return [*checks, Check("counts", float(len(wrong)), 0.0, "int64", wrong[0] if wrong else "")]


def collect_terms(root: fx.GraphModule) -> None:
    """Make the loss terms of the expert layers of `root` a second result, in place; without any, nothing."""
    calls = [node for node in root.graph.nodes if _is_expert_layer(root, node)]
    if calls:
        _collect(root, calls)
        root.recompile()


def _is_expert_layer(root: fx.GraphModule, node: fx.Node) -> bool:
    region = region_of(root.get_submodule(str(node.target))) if node.op == "call_module" else None
    return region is not None and region.kind == "moe"


def _collect(root: fx.GraphModule, calls: list[fx.Node]) -> None:
    graph, end = root.graph, output(root.graph)
    with graph.inserting_before(end):
        terms: dict[str, Any] = {"balance": None, "z": None, "counts": {}}
        for call in calls:
            region = region_of(root.get_submodule(str(call.target)))
            assert region is not None
            weights = {"balance": _balance_weight(region.settings), "z": region.settings["z_loss"]}
            for position, term in ((1, "balance"), (2, "z")):
                if weights[term]:
                    terms[term] = _plus(
                        graph, terms[term], _item(graph, call, position, term, region.index), weights[term]
                    )
            terms["counts"][region.name] = _item(graph, call, 3, "counts", region.index)
        first = region_of(root.get_submodule(str(calls[0].target)))
        assert first is not None
        for term in ("balance", "z"):
            if terms[term] is None:
                terms[term] = _nothing(graph, term, calls[0], first.index)
    end.args = ((end.args[0], terms),)


def _balance_weight(settings: dict[str, Any]) -> float:
    return float(settings["balance_loss"]) if settings["balance"] == "loss" else 0.0


def _item(graph: fx.Graph, call: fx.Node, position: int, name: str, index: int) -> fx.Node:
    with graph.inserting_after(next(reversed([u for u in call.users if u.target is operator.getitem]), call)):
        node = graph.call_function(operator.getitem, (call, position))
    node.name = f"{name}_{index}"
    return node


def _plus(graph: fx.Graph, total: fx.Node | None, term: fx.Node, weight: float) -> fx.Node:
    scaled = graph.call_function(aten.mul.Tensor, (term, weight))
    scaled.name = f"weighted_{term.name}"
    return scaled if total is None else graph.call_function(aten.add.Tensor, (total, scaled))


def _nothing(graph: fx.Graph, term: str, call: fx.Node, index: int) -> fx.Node:
    """A term that no layer asks for is zero, and reaches no gradient."""
    position = 1 if term == "balance" else 2
    made = graph.call_function(aten.zeros_like.default, (_item(graph, call, position, term, index),))
    made.name = f"no_{term}"
    return made
