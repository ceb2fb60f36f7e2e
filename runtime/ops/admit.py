"""`moec::assign` when the tokens lie on many ranks: the same rows are kept as if they lay on one.

    choices(experts [T,K], num_experts) -> [K,E] i64
        how often each expert is the k-th choice of a token here
    admit(experts [T,K], choices [R*K,E], axis, capacity_factor, eval_capacity_factor, min_capacity, random,
          training) -> order [N] i64, counts [E] i64, kept [E] i64
        `order` and `counts` as of `assign`, for the tokens here; `kept`: the rows an expert computes in all.
        `choices` are those of every rank of `axis`, gathered. Capacity counts the tokens of all ranks; the
        first by (choice, rank, token) are kept, so the ranks' tokens, joined in the order of the axis, are
        treated as one process would treat them.

With `random` and `training`, each rank keeps a random selection of its own, of the size of its share of the
places: the same distribution over experts as in one process, not the same draws.

    balance_share(scores [T,E], chosen [E], top_k) -> f32[]
    z_share(scores [T,E], chosen [E], top_k) -> f32[]
        this rank's share of the balance and z losses: the shares add up to the loss over all tokens. `chosen`
        are the choices of all ranks, i64, dropped ones included. The balance loss is linear in the
        probabilities once those are known, so no gradient has to travel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.runtime.ops.assign import check_assign, expert_capacity
from moec.runtime.ops.draws import arrival
from moec.runtime.ops.groups import axis_rank
from moec.runtime.ops.registry import define, define_composite, demand, wide


def _choices(experts: Tensor, num_experts: int) -> Tensor:
    top_k = experts.shape[1]
    shifted_TK = experts + torch.arange(top_k, device=experts.device) * num_experts
    return torch.bincount(shifted_TK.reshape(-1), minlength=top_k * num_experts).view(top_k, num_experts)


def _fake_choices(experts: Tensor, num_experts: int) -> Tensor:
    return experts.new_empty(experts.shape[1], num_experts)


def _admit(
    experts: Tensor,
    choices: Tensor,
    axis: str,
    capacity_factor: float,
    eval_capacity_factor: float,
    min_capacity: int,
    random: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    top_k, num_experts = experts.shape[1], choices.shape[1]
    check_assign(experts, num_experts, capacity_factor, eval_capacity_factor, min_capacity)
    choices_RKE = choices.view(-1, top_k, num_experts)
    factor = capacity_factor if training else eval_capacity_factor
    total_E = choices_RKE.sum((0, 1))
    num_tokens = int(total_E.sum()) // top_k
    capacity = expert_capacity(num_tokens, top_k, num_experts, factor, min_capacity) if factor else num_tokens
    place = axis_rank(axis)
    if random and training:
        slots_N = _keep_random(experts, _quota(choices_RKE.sum(1), place, capacity))
    else:
        slots_N = _keep_first(experts, _places(choices_RKE, place, capacity))
    grouped_N, order_N = torch.sort(slots_N, stable=True)
    bounds = torch.arange(num_experts + 1, device=experts.device)
    return order_N, torch.searchsorted(grouped_N, bounds).diff(), total_E.clamp(max=capacity)


def _places(choices_RKE: Tensor, place: int, capacity: int) -> Tensor:
    """How many of this rank's k-th choices of an expert are kept [K,E]: those that come before it is full."""
    of_choice_KE = choices_RKE.sum(0)
    ahead_KE = of_choice_KE.cumsum(0) - of_choice_KE + choices_RKE[:place].sum(0)
    return (capacity - ahead_KE).clamp(min=0).minimum(choices_RKE[place])


def _quota(choices_RE: Tensor, place: int, capacity: int) -> Tensor:
    """This rank's share [E] of the places of each expert, in proportion to its choices; shares add up."""
    total_E = choices_RE.sum(0)
    kept_E, until_E = total_E.clamp(max=capacity), choices_RE[: place + 1].sum(0)
    before_E, at_least_one = until_E - choices_RE[place], total_E.clamp(min=1)
    return kept_E * until_E // at_least_one - kept_E * before_E // at_least_one


def _keep_first(experts_TK: Tensor, places_KE: Tensor) -> Tensor:
    top_k, num_experts = places_KE.shape
    keys_KT = experts_TK.t() + torch.arange(top_k, device=experts_TK.device).unsqueeze(1) * num_experts
    kept_TK = _early(keys_KT.reshape(-1), places_KE.reshape(-1)).view(top_k, -1).t()
    return torch.where(kept_TK, experts_TK, num_experts).reshape(-1)


def _keep_random(experts_TK: Tensor, quota_E: Tensor) -> Tensor:
    slots_N = experts_TK.reshape(-1)
    order_N = arrival(slots_N.shape[0], slots_N.device)
    kept_N = torch.empty_like(slots_N, dtype=torch.bool)
    kept_N[order_N] = _early(slots_N[order_N], quota_E)
    return torch.where(kept_N, slots_N, quota_E.shape[0])


def _early(keys_N: Tensor, places: Tensor) -> Tensor:
    """Whether each key is among the first `places[key]` of its kind."""
    grouped_N, order_N = torch.sort(keys_N, stable=True)
    rank_N = torch.arange(keys_N.shape[0], device=keys_N.device) - torch.searchsorted(grouped_N, grouped_N)
    return torch.empty_like(keys_N, dtype=torch.bool).scatter_(0, order_N, rank_N < places[grouped_N])


def _fake_admit(
    experts: Tensor,
    choices: Tensor,
    axis: str,
    capacity_factor: float,
    eval_capacity_factor: float,
    min_capacity: int,
    random: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    demand(choices.dim() == 2, "admit", f"choices with {choices.dim()} dimensions", "choices [R*K, E]")
    num_experts = choices.shape[1]
    check_assign(experts, num_experts, capacity_factor, eval_capacity_factor, min_capacity)
    slots = experts.shape[0] * experts.shape[1]
    return experts.new_empty(slots), experts.new_empty(num_experts), experts.new_empty(num_experts)


def _balance_share(scores: Tensor, chosen: Tensor, top_k: int) -> Tensor:
    probabilities_E = scores.to(wide(scores.dtype)).softmax(-1).sum(0)
    chosen_E = chosen.to(probabilities_E.dtype)
    num_tokens = chosen_E.sum() / top_k
    return (probabilities_E * chosen_E).sum() * (scores.shape[1] / top_k) / num_tokens.square()


def _z_share(scores: Tensor, chosen: Tensor, top_k: int) -> Tensor:
    wide_TE = scores.to(wide(scores.dtype))
    largest_T1 = wide_TE.detach().amax(-1, keepdim=True)
    # Spelled out: torch's logsumexp asks whether there are tokens at all, which a graph cannot know here.
    squares = ((wide_TE - largest_T1).exp().sum(-1, keepdim=True).log() + largest_T1).square()
    return squares.sum() / (chosen.sum().to(squares.dtype) / top_k)


define("choices(Tensor experts, int num_experts) -> Tensor", _choices, _fake_choices)
define(
    "admit(Tensor experts, Tensor choices, str axis, float capacity_factor, float eval_capacity_factor,"
    " int min_capacity, bool random, bool training) -> (Tensor, Tensor, Tensor)",
    _admit,
    _fake_admit,
    random=True,
)
define_composite("balance_share(Tensor scores, Tensor chosen, int top_k) -> Tensor", _balance_share)
define_composite("z_share(Tensor scores, Tensor chosen, int top_k) -> Tensor", _z_share)
