"""How evenly experts are used, and the nudge that evens it out without a loss term."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.plan import LayerSettings


@dataclass(frozen=True)
class Load:
    """The use of one layer's experts over some tokens.

    `max_over_mean`: rows of the busiest expert over the mean (1 is even). `entropy`: of the shares, over log
    E, so 1 is even and 0 is one expert only. `dropped`: share of the (token, choice) pairs that no expert
    computed.
    """

    max_over_mean: float
    entropy: float
    dropped: float


def load_of(counts_E: Tensor, num_slots: int) -> Load:
    """The `Load` when the experts computed `counts_E` (i64 `[E]`) of `num_slots` = tokens · top_k rows."""
    kept = int(counts_E.sum())
    share_E = counts_E.double() / max(kept, 1)
    entropy = float(torch.special.entr(share_E).sum())
    num_experts = counts_E.numel()
    return Load(
        max_over_mean=float(share_E.max()) * num_experts,
        entropy=entropy / math.log(num_experts) if num_experts > 1 else 1.0,
        dropped=1.0 - kept / num_slots,
    )


def loads_of(
    counts: Mapping[str, Tensor], settings: Mapping[str, LayerSettings], num_tokens: int
) -> dict[str, Load]:
    """The `Load` of every layer in `counts` after `num_tokens` tokens."""
    return {layer: load_of(row, num_tokens * settings[layer].top_k) for layer, row in counts.items()}


def on_host(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same counts on the CPU; a device is waited for once, not once a layer."""
    if not counts:
        return {}
    together = torch.cat(list(counts.values())).cpu()
    return dict(zip(counts, together.split([row.numel() for row in counts.values()]), strict=True))


@torch.no_grad()
def nudge_biases(
    biases: Mapping[str, Tensor], counts: Mapping[str, Tensor], settings: Mapping[str, LayerSettings]
) -> None:
    """Make busy experts a little less likely to be chosen, and idle ones a little more; changes `biases`.

    bias += rate · sign(mean load - load), once after each optimizer step.
    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts".
    """
    for layer, bias_E in biases.items():
        load_E = counts[layer].to(torch.float64)
        step_E = torch.sign(load_E.mean() - load_E).to(bias_E)
        bias_E.add_(step_E, alpha=settings[layer].bias_rate)
