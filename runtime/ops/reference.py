"""What each `moec::` operator means, said slowly: one token at a time, in plain torch.

Same names, arguments and results as `torch.ops.moec`. Nothing here is fast or clever; it runs in any dtype
(float64 for proofs), and autograd differentiates it by itself, so gradients need no second definition. Random
draws come from `draws`, in the same order as the operators, so equal seeds give equal results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal

import torch
from torch import Tensor

from moec.runtime.ops import draws


def router(x: Tensor, weight: Tensor) -> Tensor:
    """Scores [T,E], one dot product at a time, in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, torch.float32), weight.dtype)
    return torch.stack([torch.stack([(row * w).sum() for w in weight.to(dtype)]) for row in x.to(dtype)])


_scores = router  # where an argument has that name


def route(
    scores: Tensor, bias: Tensor | None, top_k: int, gate: str, noise: str, training: bool
) -> tuple[Tensor, Tensor]:
    """Weights [T,K] and experts [T,K]: the largest affinities of each row, ties to the lower index."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    noisy = scores.detach()
    if noise == "rsample" and training:
        noisy = noisy + draws.gumbel_like(noisy)
    weights, experts = [], []
    for row, noisy_row in zip(scores, noisy, strict=True):
        chosen = _choose(noisy_row, bias, top_k, gate)
        experts.append(torch.tensor(chosen))
        weights.append(_weigh(row, chosen, gate))
    return torch.stack(weights), torch.stack(experts)


def _choose(row: Tensor, bias: Tensor | None, top_k: int, gate: str) -> list[int]:
    affinity = row
    if bias is not None:
        affinity = (row.sigmoid() if gate == "sigmoid" else row.softmax(0)) + bias.detach().to(row.dtype)
    values = affinity.tolist()
    return sorted(range(len(values)), key=lambda expert: (-values[expert], expert))[:top_k]


def _weigh(row: Tensor, chosen: list[int], gate: str) -> Tensor:
    affinity = (row.sigmoid() if gate == "sigmoid" else row.softmax(0))[chosen]
    if gate == "probability":
        return affinity
    normalized = affinity / affinity.sum()
    if gate == "straight-through":
        return normalized.detach() * affinity / affinity.detach()
    return normalized


def jitter(x: Tensor, epsilon: float, training: bool) -> Tensor:
    """x times uniform(1 - epsilon, 1 + epsilon) while training, a copy of x otherwise."""
    return x * draws.uniform_around_one(x, epsilon) if training else x.clone()


def assign(
    experts: Tensor,
    num_experts: int,
    capacity_factor: float,
    eval_capacity_factor: float,
    min_capacity: int,
    random: bool,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Order [N] and counts [E]: slots walk in one by one, and find their expert open or full."""
    tokens, top_k = experts.shape
    factor = capacity_factor if training else eval_capacity_factor
    capacity = tokens
    if factor:
        share = math.ceil(Decimal(repr(factor)) * tokens * top_k / num_experts)
        capacity = min(max(share, min_capacity), tokens)
    arrivals = [token * top_k + choice for choice in range(top_k) for token in range(tokens)]
    if factor and random and training and capacity < tokens:
        arrivals = draws.arrival(tokens * top_k, experts.device).tolist()
    chosen = experts.flatten().tolist()
    kept: list[list[int]] = [[] for _ in range(num_experts)]
    dropped: list[int] = []
    for slot in arrivals:
        place = kept[chosen[slot]]
        (place if len(place) < capacity else dropped).append(slot)
    order = [slot for place in [*kept, dropped] for slot in sorted(place)]
    return torch.tensor(order, dtype=torch.int64), torch.tensor([len(place) for place in kept])


def dispatch(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Row i is a copy of the token that slot order[i] belongs to."""
    return torch.stack([x[slot // top_k] for slot in order.tolist()])


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Each row times the weight of the expert whose turn it is; zeros after the last turn."""
    turns = [expert for expert, count in enumerate(counts.tolist()) for _ in range(count)]
    out = [weight[expert] @ row for expert, row in zip(turns, rows, strict=False)]
    if bias is not None:
        out = [y + bias[expert] for expert, y in zip(turns, out, strict=True)]
    out += [rows.new_zeros(weight.shape[1])] * (rows.shape[0] - len(turns))
    return torch.stack(out)


def grouped_outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """For each expert, the sum of outer products of its rows."""
    out = [left.new_zeros(left.shape[1], right.shape[1]) for _ in range(counts.shape[0])]
    turns = [expert for expert, count in enumerate(counts.tolist()) for _ in range(count)]
    for expert, l_row, r_row in zip(turns, left, right, strict=False):
        out[expert] = out[expert] + torch.outer(l_row, r_row)
    return torch.stack(out)


def grouped_sum(rows: Tensor, counts: Tensor) -> Tensor:
    """For each expert, the sum of its rows."""
    out = [rows.new_zeros(rows.shape[1]) for _ in range(counts.shape[0])]
    turns = [expert for expert, count in enumerate(counts.tolist()) for _ in range(count)]
    for expert, row in zip(turns, rows, strict=False):
        out[expert] = out[expert] + row
    return torch.stack(out)


def combine(rows: Tensor, weights: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    """Each token's sum of weight times row over its kept slots."""
    sums = torch.promote_types(torch.promote_types(rows.dtype, torch.float32), weights.dtype)
    out = [torch.zeros(rows.shape[1], dtype=sums) for _ in range(weights.shape[0])]
    for row, slot in list(zip(rows, order.tolist(), strict=True))[: int(counts.sum())]:
        token, choice = divmod(slot, weights.shape[1])
        out[token] = out[token] + weights[token, choice].to(sums) * row.to(sums)
    return torch.stack(out).to(rows.dtype)


def balance_loss(scores: Tensor, experts: Tensor) -> Tensor:
    """E/K times the sum over experts of mean probability times slots routed per token."""
    tokens, num_experts = scores.shape
    probabilities = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
    chosen = experts.flatten().tolist()
    terms = [probabilities[:, e].mean() * (chosen.count(e) / tokens) for e in range(num_experts)]
    return torch.stack(terms).sum() * num_experts / experts.shape[1]


def z_loss(scores: Tensor) -> Tensor:
    """Mean over tokens of the squared logarithm of the sum of exponentials."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.stack([torch.logsumexp(row, 0) ** 2 for row in scores]).mean()


def gate(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    top_k: int,
    gate: str,
    noise: str,
    capacity_factor: float,
    eval_capacity_factor: float,
    min_capacity: int,
    random: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores, weights, experts, order and counts, by the three definitions above."""
    scores = _scores(x, router)
    weights, experts = route(scores, bias, top_k, gate, noise, training)
    limits = (capacity_factor, eval_capacity_factor, min_capacity, random, training)
    return scores, weights, experts, *assign(experts, router.shape[0], *limits)


def moe_ffn(
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    counts: Tensor,
    matrices: list[Tensor],
    biases: list[Tensor | None],
    formula: Callable[..., Tensor],
    dense: Tensor | None = None,
    mix: Tensor | None = None,
) -> Tensor:
    """Each kept slot of each token: up products of its expert, the formula, the down product, its weight.

    Here the formula is a function of tensors, so that it is not read by what is tested.
    """
    turns = [expert for expert, count in enumerate(counts.tolist()) for _ in range(count)]
    sums = [x.new_zeros(matrices[-1].shape[1]) for _ in x]
    for slot, expert in zip(order.tolist(), turns, strict=False):
        token, choice = divmod(slot, weights.shape[1])
        ups = [_affine(x[token], m[expert], b, expert) for m, b in zip(matrices[:-1], biases, strict=False)]
        out = _affine(formula(*ups), matrices[-1][expert], biases[-1], expert)
        sums[token] = sums[token] + weights[token, choice] * out
    y = torch.stack(sums)
    if dense is None:
        return y
    return y + dense if mix is None else y * mix[:, :1] + dense * mix[:, 1:]


def _affine(row: Tensor, matrix: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    return matrix @ row if bias is None else matrix @ row + bias[expert]
