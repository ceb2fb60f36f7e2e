"""The terms that keep a router healthy: `moec::balance_loss` and `moec::z_loss`.

    balance_loss(scores [T,E], experts [T,K]) -> f32[]
        E/K * sum over e of mean-probability(e) * fraction-routed(e): mean softmax probability, and the slots
        that chose e divided by T. DeepSpeed's `topkgating` (its `top1gating` for K = 1); 1 when routing is
        even. Gradients flow through the probabilities only.
    z_loss(scores [T,E]) -> f32[]
        mean over tokens of logsumexp(scores) squared (ST-MoE, section 3.3).

Both are in float32 (float64 for float64 scores), under autocast too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.runtime.ops.registry import define_composite, demand, wide


def _balance_loss(scores: Tensor, experts: Tensor) -> Tensor:
    demand(scores.dim() == 2, "balance_loss", f"scores with {scores.dim()} dimensions", "scores [T, E]")
    demand(experts.dim() == 2, "balance_loss", f"experts with {experts.dim()} dimensions", "experts [T, K]")
    tokens, num_experts = scores.shape
    mean_E = scores.to(wide(scores.dtype)).softmax(-1).mean(0)
    chosen_N = experts.reshape(-1)
    ones_N = torch.ones_like(chosen_N, dtype=mean_E.dtype)
    routed_E = torch.zeros_like(mean_E.detach()).scatter_add(0, chosen_N, ones_N) / tokens
    return (mean_E * routed_E).sum() * (num_experts / experts.shape[1])


def _z_loss(scores: Tensor) -> Tensor:
    demand(scores.dim() == 2, "z_loss", f"scores with {scores.dim()} dimensions", "scores [T, E]")
    return scores.to(wide(scores.dtype)).logsumexp(-1).square().mean()


define_composite("balance_loss(Tensor scores, Tensor experts) -> Tensor", _balance_loss)
define_composite("z_loss(Tensor scores) -> Tensor", _z_loss)
