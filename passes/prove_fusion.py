"""The proof of a fusion: everything a program gives, and every gradient, before and after.

Weights are random and no two experts alike, so that experts, branches and their shares cannot be mistaken for
each other. Evaluation and training mode both, from the same seed: a fusion draws what its parts drew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import Check, Program
from moec.ir.compare import EXACT, error_of, gradients_of, worst_gradient

from .by_hand import Pair, randomise

SEED = 11


def prove_fusion(before: Program, after: Program) -> list[Check]:
    """Logits, loss terms and counts, and the gradient of every parameter, in both modes.

    Nothing for programs that cannot run by themselves (of a rank, of a decoder) or have no weights yet.
    """
    alone = after.rank is None and sum(node.op == "placeholder" for node in after.graph.graph.nodes) == 1
    if not alone or any(parameter.is_meta for parameter in after.parameters()):
        return []
    pair = Pair.of(before, after)
    randomise(pair.after)
    return [check for training in (False, True) for check in _compare(pair, training)]


def _compare(pair: Pair, training: bool) -> list[Check]:
    mode = "training" if training else "evaluation"
    needed, found = (_results(graph.train(training), pair.tokens) for graph in (pair.before, pair.after))
    if needed.keys() != found.keys():
        return [
            Check(f"results in {mode}", float("inf"), EXACT, worst=", ".join(needed.keys() ^ found.keys()))
        ]
    leaves = dict(pair.after.named_parameters())
    right, left = (gradients_of(_smooth(results), leaves) for results in (needed, found))
    errors = {name: error_of(found[name].detach(), value.detach()) for name, value in needed.items()}
    gradient, worst = worst_gradient(right, left)
    return [
        Check(f"results in {mode}", max(errors.values()), EXACT, worst=max(errors, key=errors.__getitem__)),
        Check(f"gradients in {mode}", gradient, EXACT, worst=worst),
    ]


def _results(graph: fx.GraphModule, tokens: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    with torch.enable_grad():
        return _flat("", graph(tokens))


def _flat(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name or "logits": value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: found for part, item in items for key, found in _flat(f"{name}.{part}", item).items()}


def _smooth(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in results.items() if value.is_floating_point()}
