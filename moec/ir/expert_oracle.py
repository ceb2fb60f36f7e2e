"""What an expert layer computes, said one token at a time.

Nothing here sorts, groups or batches, and nothing is shared with the operators it judges: the gate's
formula, the capacity rule and the losses are written out again from their definitions. Differentiable
throughout, and meant for float64. Sources: DeepSpeed-MoE sections 3-4; GShard for the capacity rule; Switch
Transformer for the balance term.

Legend: T tokens, D model, E experts, K chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

Gate = Literal["probability", "normalized", "straight-through", "sigmoid"]
Residual = Literal["none", "sum", "learned"]
State = Mapping[str, Tensor]
DenseFunction = nn.Module | Callable[[State, Tensor], Tensor]


@dataclass(frozen=True)
class OracleAnswer:
    """`y` has the shape of the input; `weights` [T, K] and `experts` i64 [T, K] are the choices, best
    first; `counts` i64 [E] are rows kept per expert, `dropped` the (token, choice) pairs that found no
    room; `balance` and `z` are the unweighted loss terms, scalars."""

    y: Tensor
    weights: Tensor
    experts: Tensor
    counts: Tensor
    dropped: tuple[tuple[int, int], ...]
    balance: Tensor
    z: Tensor


def moe_oracle(
    ffn: DenseFunction,
    expert_states: Sequence[State],
    x: Tensor,
    router: Tensor,
    *,
    top_k: int,
    gate: Gate,
    bias: Tensor | None = None,
    capacity_factor: float = 0.0,
    min_capacity: int = 4,
    residual: Residual = "none",
    dense_state: State | None = None,
    mix: tuple[Tensor, Tensor | None] | None = None,
    router_input: Tensor | None = None,
    choices: Sequence[Sequence[int]] | None = None,
    kept: set[tuple[int, int]] | None = None,
) -> OracleAnswer:
    """Evaluate a mixture of experts the slow way.

    `ffn`: the dense feed-forward, a module (called with `torch.func.functional_call`) or a function (state,
    rows [1, D]) → [1, D]. `expert_states[e]`: expert e's parameters under the feed-forward's own names. x
    [..., D]; `router` [E, D]; `bias` [E] takes part in choosing only. `capacity_factor` 0.0 keeps every row.
    `dense_state`: the feed-forward kept beside the experts, for residual `sum` (added) and `learned`: there
    the two are weighed by softmax(mix_weight · x + mix_bias), experts first, `mix` being (weight [2, D], bias
    [2]). `router_input`: what the router reads instead of x (x detached, say). `choices` [T][K] and `kept`
    (token, choice): what training drew at random, instead of the best scores and the first come.
    """
    rows_TD = x.reshape(-1, x.shape[-1])
    read_TD = rows_TD if router_input is None else router_input.reshape(rows_TD.shape)
    scores_TE = torch.stack([router @ row for row in read_TD.to(router.dtype)])
    choices = choices or [choose(scores, top_k, gate, bias) for scores in scores_TE]
    weights = [weigh(scores, chosen, gate) for scores, chosen in zip(scores_TE, choices, strict=True)]
    if kept is None:
        kept = keep_within_capacity(choices, len(expert_states), capacity_factor, min_capacity)
    out = []
    for token, row in enumerate(rows_TD):
        asked = [(choices[token][k], weights[token][k]) for k in range(top_k) if (token, k) in kept]
        y = _weighed(ffn, expert_states, row, asked)
        out.append(_with_residual(y, row, ffn, residual, dense_state, mix))
    return OracleAnswer(
        y=torch.stack(out).reshape(x.shape),
        weights=torch.stack(weights),
        experts=torch.tensor(choices),
        counts=torch.tensor([sum(choices[t][k] == e for t, k in kept) for e in range(len(expert_states))]),
        dropped=tuple(slot for slot in product(range(len(choices)), range(top_k)) if slot not in kept),
        balance=balance_oracle(scores_TE, choices),
        z=z_oracle(scores_TE),
    )


def choose(scores: Tensor, top_k: int, gate: Gate, bias: Tensor | None = None) -> list[int]:
    """The experts of one token, best first: largest affinity (plus bias); equal ones by lower index."""
    affinity = scores.detach()
    if bias is not None:
        affinity = (torch.sigmoid(affinity) if gate == "sigmoid" else _softmax(affinity)) + bias
    values = affinity.tolist()
    return sorted(range(len(values)), key=lambda expert: (-values[expert], expert))[:top_k]


def weigh(scores: Tensor, chosen: Sequence[int], gate: Gate) -> Tensor:
    """The weights [K] of the chosen experts of one token, by the gate's formula."""
    affinity = torch.sigmoid(scores) if gate == "sigmoid" else _softmax(scores)
    values = [affinity[expert] for expert in chosen]
    if gate == "probability":
        return torch.stack(values)
    total = sum(values[1:], start=values[0])
    shares = [value / total for value in values]
    if gate == "straight-through":
        pairs = zip(shares, values, strict=True)
        shares = [share.detach() * (value / value.detach()) for share, value in pairs]
    return torch.stack(shares)


def keep_within_capacity(
    choices: Sequence[Sequence[int]], num_experts: int, factor: float, min_capacity: int
) -> set[tuple[int, int]]:
    """The (token, choice) pairs that find room: every first choice is seated before any second choice."""
    num_tokens, top_k = len(choices), len(choices[0])
    capacity = num_tokens
    if factor:
        share = math.ceil(Fraction(str(factor)) * num_tokens * top_k / num_experts)
        capacity = min(max(share, min_capacity), num_tokens)
    seats = dict.fromkeys(range(num_experts), capacity)
    kept = set()
    for choice in range(top_k):
        for token in range(num_tokens):
            expert = choices[token][choice]
            if seats[expert]:
                seats[expert] -= 1
                kept.add((token, choice))
    return kept


def balance_oracle(scores_TE: Tensor, choices: Sequence[Sequence[int]]) -> Tensor:
    """E/K · Σₑ (mean probability of e) · (slots sent to e, per token); 1 when all is even. Drops do not
    count."""
    num_tokens, num_experts = scores_TE.shape
    probabilities = [_softmax(scores) for scores in scores_TE]
    total = scores_TE.new_zeros(())
    for expert in range(num_experts):
        mean = sum((p[expert] for p in probabilities), start=scores_TE.new_zeros(())) / num_tokens
        routed = sum(list(chosen).count(expert) for chosen in choices) / num_tokens
        total = total + mean * routed
    return total * num_experts / len(choices[0])


def z_oracle(scores_TE: Tensor) -> Tensor:
    """The mean over tokens of (log Σ exp scores)²; ST-MoE, section 3."""
    terms = []
    for scores in scores_TE:
        top = scores.detach().max()
        terms.append((top + torch.log(torch.exp(scores - top).sum())) ** 2)
    return torch.stack(terms).mean()


def _softmax(scores: Tensor) -> Tensor:
    powers = torch.exp(scores - scores.detach().max())
    return powers / powers.sum()


def _apply(ffn: DenseFunction, state: State, row: Tensor) -> Tensor:
    rows = row.unsqueeze(0)
    out = (
        torch.func.functional_call(ffn, dict(state), (rows,))
        if isinstance(ffn, nn.Module)
        else ffn(state, rows)
    )
    return out[0]


def _weighed(
    ffn: DenseFunction, states: Sequence[State], row: Tensor, asked: Sequence[tuple[int, Tensor]]
) -> Tensor:
    """The sum of what experts make of one token; `asked`: each that had room for it, and its weight."""
    y = torch.zeros_like(row)
    for expert, weight in asked:
        y = y + weight.to(row.dtype) * _apply(ffn, states[expert], row)
    return y


def _with_residual(
    y: Tensor,
    row: Tensor,
    ffn: DenseFunction,
    residual: Residual,
    dense_state: State | None,
    mix: tuple[Tensor, Tensor | None] | None,
) -> Tensor:
    if residual == "none":
        return y
    if dense_state is None or (residual == "learned" and mix is None):
        raise ValueError(f"residual {residual!r} needs dense_state" + " and mix" * (residual == "learned"))
    dense = _apply(ffn, dense_state, row)
    if mix is None:
        return y + dense
    weight, bias = mix
    scores = weight @ row.to(weight.dtype)
    shares = _softmax(scores if bias is None else scores + bias).to(row.dtype)
    return shares[0] * y + shares[1] * dense
