"""The random draws of the operators, each in one place.

An operator and its plain reference call the same function here, so with the same seed they see the same
numbers and can be compared value by value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_like(scores_TE: Tensor) -> Tensor:
    """Standard Gumbel noise: adding it to logits and taking the largest samples from their softmax."""
    return -torch.empty_like(scores_TE).exponential_().log()


def arrival(num_slots: int, device: torch.device) -> Tensor:
    """A uniformly random order [N] in which slots claim places at their experts."""
    return torch.randperm(num_slots, device=device)


def uniform_around_one(x: Tensor, epsilon: float) -> Tensor:
    """Factors shaped as `x`, uniform in [1 - epsilon, 1 + epsilon)."""
    return 1.0 + epsilon * (2.0 * torch.rand_like(x) - 1.0)
