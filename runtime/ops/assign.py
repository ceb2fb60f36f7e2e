"""`moec::assign`: the table from tokens to experts, made by sorting.

    assign(experts [T,K], num_experts, capacity_factor, eval_capacity_factor, min_capacity, random, training)
        -> order [N] i64, counts [E] i64

`order` lists the slots (slot n = t*K + k is token t's k-th choice) grouped by expert, in slot order inside a
group, and then the dropped slots; `counts` holds the kept rows of each expert. A factor of 0.0 keeps all.
Memory is linear in N: nothing of size tokens x experts x capacity exists (GShard's one-hot dispatch has it).
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from moec.runtime.ops.draws import arrival
from moec.runtime.ops.registry import define, demand


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float, minimum: int) -> int:
    """Most rows one expert keeps: max(ceil(T*K/E * factor), minimum), never more than T.

    `factor` counts as the decimal it is written as: 1.1 times 10 rows is 11, not ceil(11.000000000000002).
    """
    share = ceil(Fraction(repr(factor)) * num_tokens * top_k / num_experts)
    return min(max(share, minimum), num_tokens)


def check_assign(
    experts: Tensor, num_experts: int, capacity_factor: float, eval_capacity_factor: float, min_capacity: int
) -> None:
    """Raise an `OperatorError` for arguments that `moec::assign` cannot mean anything by."""
    demand(experts.dim() == 2, "assign", f"experts with {experts.dim()} dimensions", "experts [T, K]")
    demand(experts.dtype == torch.int64, "assign", f"experts of {experts.dtype}", "experts of torch.int64")
    top_k = experts.shape[1]
    demand(
        num_experts >= top_k, "assign", f"{num_experts} experts, {top_k} choices a token", "num_experts >= K"
    )
    for name, factor in (
        ("capacity_factor", capacity_factor),
        ("eval_capacity_factor", eval_capacity_factor),
    ):
        finite = 0.0 <= factor < float("inf")
        demand(finite, "assign", f"{name} {factor}", "a finite factor >= 0 (0.0 keeps every row)")
    demand(min_capacity >= 0, "assign", f"min_capacity {min_capacity}", "min_capacity >= 0")


def _assign(
    experts: Tensor,
    num_experts: int,
    capacity_factor: float,
    eval_capacity_factor: float,
    min_capacity: int,
    random: bool,
    training: bool,
) -> tuple[Tensor, Tensor]:
    check_assign(experts, num_experts, capacity_factor, eval_capacity_factor, min_capacity)
    _check_range(experts, num_experts)
    factor = capacity_factor if training else eval_capacity_factor
    slots_N = experts.reshape(-1)
    if factor > 0.0:
        capacity = expert_capacity(experts.shape[0], experts.shape[1], num_experts, factor, min_capacity)
        if capacity < experts.shape[0]:
            slots_N = _send_overflow_away(experts, capacity, num_experts, random and training)
    grouped_N, order_N = torch.sort(slots_N, stable=True)
    return order_N, _count(grouped_N, num_experts)


def _check_range(experts: Tensor, num_experts: int) -> None:
    if experts.device.type != "cpu" or experts.numel() == 0:
        return  # reading values back would stall an accelerator; there `route` is what guarantees the range
    low, high = (int(bound) for bound in experts.aminmax())
    demand(
        0 <= low <= high < num_experts, "assign", f"expert indices {low} to {high}", f"0 to {num_experts - 1}"
    )


def _send_overflow_away(experts_TK: Tensor, capacity: int, num_experts: int, random: bool) -> Tensor:
    """Expert of each slot [N], with `num_experts` for the slots that arrive after their expert is full."""
    num_tokens, top_k = experts_TK.shape
    count = num_tokens * top_k
    places_N = torch.arange(count, device=experts_TK.device)
    # Every first choice arrives before any second choice; inside a choice, by token.
    arrivals_N = (
        arrival(count, experts_TK.device) if random else places_N.view(num_tokens, top_k).t().reshape(-1)
    )
    grouped_N, by_expert_N = torch.sort(experts_TK.reshape(-1)[arrivals_N], stable=True)
    rank_N = places_N - torch.searchsorted(grouped_N, grouped_N)
    kept_N = torch.where(rank_N < capacity, grouped_N, num_experts)
    return torch.empty_like(kept_N).scatter_(0, arrivals_N[by_expert_N], kept_N)


def _count(grouped_N: Tensor, num_experts: int) -> Tensor:
    bounds = torch.arange(num_experts + 1, device=grouped_N.device)
    return torch.searchsorted(grouped_N, bounds).diff()


def _fake(
    experts: Tensor,
    num_experts: int,
    capacity_factor: float,
    eval_capacity_factor: float,
    min_capacity: int,
    random: bool,
    training: bool,
) -> tuple[Tensor, Tensor]:
    check_assign(experts, num_experts, capacity_factor, eval_capacity_factor, min_capacity)
    return experts.new_empty(experts.shape[0] * experts.shape[1]), experts.new_empty(num_experts)


define(
    "assign(Tensor experts, int num_experts, float capacity_factor, float eval_capacity_factor,"
    " int min_capacity, bool random, bool training) -> (Tensor, Tensor)",
    _assign,
    _fake,
    random=True,
)
