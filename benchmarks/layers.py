"""The layers that are measured: dense, and sparse as `program.fused()` and `lift_experts` write them.

Legend: T tokens, D model, F hidden, E experts, K chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec.runtime.ops  # noqa: F401
from moec.runtime.ops.packed import PACKED

ops = torch.ops.moec


@dataclass(frozen=True)
class Shape:
    """One layer: SwiGLU without biases if `gated`, else GELU with; `residual`: a learned mix with a dense
    feed-forward. `factor`: the capacity factor, 0.0 for no drops."""

    width: int
    hidden: int
    experts: int
    top_k: int
    gated: bool
    gate: str = "normalized"
    factor: float = 0.0
    residual: bool = False

    @property
    def formula(self) -> str:
        """What stands between the products, over one up product."""
        if not self.gated:
            return "lambda h: gelu(h)"
        return f"lambda h: silu(h[..., :{self.hidden}]) * h[..., {self.hidden}:]"

    @property
    def active(self) -> int:
        """Weights that one token meets in its experts, times their number."""
        return self.top_k * self.width * self.hidden * (2 + self.gated)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Small normal numbers, as at initialisation."""
    return nn.Parameter((0.02 * torch.randn(*shape)).to(dtype))


class Dense(nn.Module):
    """down(gelu(up(x))): the same arithmetic a token costs in a top-1 layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        out: Tensor = self.down(F.gelu(self.up(x_TD)))
        return out


class OurDense(Dense):
    """`Dense`, its products by `moec.linear`: the same library as the sparse layer's."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        h = F.gelu(ops.linear(x_TD, self.up.weight, self.up.bias))
        out: Tensor = ops.linear(h, self.down.weight, self.down.bias)
        return out


class Sparse(nn.Module):
    """Gate and experts in two operators, as a fused program has them."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape = shape
        width, hidden, experts, gated = shape.width, shape.hidden, shape.experts, shape.gated
        self.router = parameter(experts, width)
        self.up = parameter(experts, hidden * (1 + gated), width, dtype=dtype)
        self.down = parameter(experts, width, hidden, dtype=dtype)
        self.up_bias = None if gated else parameter(experts, hidden, dtype=dtype)
        self.down_bias = None if gated else parameter(experts, width, dtype=dtype)
        self.dense = OurDense(width, hidden).to(dtype) if shape.residual else None
        self.mix = nn.Linear(width, 2).to(dtype) if shape.residual else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        shape = self.shape
        limits = (shape.factor, shape.factor, 4, False, self.training)
        _, weights, _, order, counts = ops.gate(
            x_TD, self.router, None, shape.top_k, shape.gate, "none", *limits
        )
        out: Tensor = ops.moe_ffn(
            x_TD, weights, order, counts, [self.up, self.down], [self.up_bias, self.down_bias],
            shape.formula, *self._beside(x_TD),
        )  # fmt: skip
        return out

    def _beside(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        if self.dense is None or self.mix is None:
            return ()
        return self.dense(x_TD), self.mix(x_TD).softmax(-1)

    def packed(self) -> Sparse:
        """The same layer over the same weights, which are packed too, as a decoder has them if asked to."""
        with torch.device("meta"):
            other = Sparse(self.shape, self.up.dtype).train(self.training)
        other.load_state_dict(self.state_dict(), assign=True)
        for weight in (other.up, other.down, *(w for w in other.parameters() if w.dim() == 2)):
            PACKED.keep(weight)
        return other

    @torch.no_grad()
    def used(self, x_TD: Tensor) -> int:
        """How many experts these tokens visit."""
        return int(
            (x_TD.to(self.router.dtype) @ self.router.t()).topk(self.shape.top_k).indices.unique().numel()
        )


class Unfused(nn.Module):
    """The layer of `sparse` as a program has it before it is fused: an operator for each step."""

    def __init__(self, sparse: Sparse) -> None:
        super().__init__()
        self.sparse = sparse

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        layer, shape = self.sparse, self.sparse.shape
        scores = ops.router(x_TD, layer.router)
        weights, experts = ops.route(scores, None, shape.top_k, shape.gate, "none", layer.training)
        limits = (shape.experts, shape.factor, shape.factor, 4, False, layer.training)
        order, counts = ops.assign(experts, *limits)
        rows = ops.dispatch(x_TD, order, shape.top_k)
        hidden = self._activate(ops.grouped_linear(rows, layer.up, layer.up_bias, counts))
        out = ops.grouped_linear(hidden, layer.down, layer.down_bias, counts)
        sums: Tensor = ops.combine(out, weights, order, counts)
        return sums

    def _activate(self, h: Tensor) -> Tensor:
        if not self.sparse.shape.gated:
            return F.gelu(h)
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up
