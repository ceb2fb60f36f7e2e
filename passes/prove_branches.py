"""The proof of residual branches: two feed-forwards with weights of their own, put together by hand.

A branch starts with the very weights of the feed-forward beside it, which hides mistakes: it does not
matter then which of the two gets which share. So the proof gives every branch, and every mix, random
weights of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from moec.ir import Check, Program, regions

from .by_hand import Pair, StandIn, randomise, region_in


def prove_branches(before: Program, after: Program) -> list[Check]:
    """Logits and gradients with every branch that `after` has and `before` has not."""
    added = [name for name in regions(after.graph, "branch") if not hasattr(before.graph, name)]
    if not added or any(p.is_meta for p in after.parameters()):
        return []
    pair = Pair.of(before, after)
    stand_ins = {}
    for name in added:
        branch = region_in(pair.after, name)
        _untie(branch)
        index = name.removeprefix("branch_")
        mix = region_in(pair.after, f"mix_{index}") if hasattr(pair.after, f"mix_{index}") else None
        if mix is not None:
            randomise(mix)
        stand_ins[f"ffn_{index}"] = _both(branch, mix)
    return pair.checks("two branches by hand", stand_ins)


def _untie(branch: fx.GraphModule) -> None:
    """Parameters of its own, in place of those it shares with the feed-forward beside it."""
    for module in branch.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(value.detach().clone())
    randomise(branch)


def _both(branch: fx.GraphModule, mix: fx.GraphModule | None) -> StandIn:
    """f(x) + b(x), or b(x)·c₀ + f(x)·c₁ with c = softmax(linear(x)): experts first."""
    state: dict[str, Tensor] = dict(branch.named_parameters())

    def stand_in(dense: fx.GraphModule, x: Tensor) -> Tensor:
        f, b = dense(x), torch.func.functional_call(dense, state, (x,))
        if mix is None:
            return f + b
        scores = x @ mix.get_parameter("coefficient.weight").T + mix.get_parameter("coefficient.bias")
        first, second = scores.exp().unbind(-1)
        share = (first / (first + second)).unsqueeze(-1)
        return b * share + f * (1 - share)

    return stand_in
