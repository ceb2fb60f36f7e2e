"""The layers that are measured: dense, and sparse as `lift_experts` writes them into a program.

Legend: T tokens, D model, F hidden, E experts, K chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec.runtime.ops  # noqa: F401

ops = torch.ops.moec


def parameter(*shape: int) -> nn.Parameter:
    """Small normal numbers, as at initialisation."""
    return nn.Parameter(0.02 * torch.randn(*shape))


class Dense(nn.Module):
    """down(gelu(up(x))): the same arithmetic a token costs in a top-1 layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        out: Tensor = self.down(F.gelu(self.up(x_TD)))
        return out


class DenseAsOneExpert(nn.Module):
    """`Dense` through `grouped_linear`: the same library computes its products as the sparse layer's."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.up_bias = parameter(1, hidden, width), parameter(1, hidden)
        self.down, self.down_bias = parameter(1, width, hidden), parameter(1, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        counts = torch.tensor([x_TD.shape[0]])
        h = F.gelu(ops.grouped_linear(x_TD, self.up, self.up_bias, counts))
        out: Tensor = ops.grouped_linear(h, self.down, self.down_bias, counts)
        return out


class Sparse(nn.Module):
    """Router, table, rows, experts (GELU with biases, or SwiGLU without), weighted sum."""

    def __init__(
        self, width: int, hidden: int, experts: int, top_k: int, gate: str, gated: bool, factor: float = 0.0
    ) -> None:
        super().__init__()
        self.options = (top_k, gate)
        self.gated, self.factor = gated, factor
        self.router = parameter(experts, width)
        self.up = parameter(experts, hidden * (1 + gated), width)
        self.down = parameter(experts, width, hidden)
        self.up_bias = None if gated else parameter(experts, hidden)
        self.down_bias = None if gated else parameter(experts, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        y, *_ = self.routed(x_TD)
        return y

    def routed(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y [T, D], with the scores and experts that a balance loss needs."""
        top_k, gate = self.options
        scores = F.linear(x_TD, self.router)
        weights, experts = ops.route(scores, None, top_k, gate, "none", self.training)
        count = self.router.shape[0]
        order, counts = ops.assign(experts, count, self.factor, self.factor, 4, False, self.training)
        rows = ops.dispatch(x_TD, order, top_k)
        hidden = self._activate(ops.grouped_linear(rows, self.up, self.up_bias, counts))
        out = ops.grouped_linear(hidden, self.down, self.down_bias, counts)
        return ops.combine(out, weights, order, counts), scores, experts

    def _activate(self, h: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(h)
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up
