"""`moec::gate` on a CPU, for the one token of a decoder's step: there is no table to sort.

Each chosen expert has one row, which no capacity drops (every capacity is at least one), so the table is the
chosen experts in order of their numbers. Anything else is what `gate` does on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.runtime.ops.assign import check_assign
from moec.runtime.ops.gate import Gated, gate_by_parts
from moec.runtime.ops.registry import LIBRARY


def _gate(
    x: Tensor, router: Tensor, bias: Tensor | None, top_k: int, gate: str, noise: str,
    capacity_factor: float, eval_capacity_factor: float, min_capacity: int, random: bool, training: bool,
) -> Gated:  # fmt: skip
    limits = (capacity_factor, eval_capacity_factor, min_capacity)
    if training or x.dim() != 2 or x.shape[0] != 1:
        return gate_by_parts(x, router, bias, top_k, gate, noise, *limits, random, training)
    scores_1E = torch.ops.moec.router.default(x, router)
    weights_1K, experts_1K = torch.ops.moec.route.default(scores_1E, bias, top_k, gate, noise, training)
    experts = router.shape[0]
    check_assign(experts_1K, experts, *limits)
    slots_N = experts_1K.view(-1)
    order_N = slots_N.argsort() if top_k > 1 else torch.zeros_like(slots_N)
    counts_E = torch.zeros(experts, dtype=torch.int64).index_fill_(0, slots_N, 1)
    return scores_1E, weights_1K, experts_1K, order_N, counts_E


LIBRARY.impl("gate", _gate, "CPU")
