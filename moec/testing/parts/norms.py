"""Normalisations: torch's own modules, and the same spelled by hand, with and without a cast to fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

NormKind = Literal["layer", "rms", "layer_by_hand", "rms_rsqrt", "rms_sqrt", "rms_pow"]
NORM_KINDS: tuple[NormKind, ...] = ("layer", "rms", "layer_by_hand", "rms_rsqrt", "rms_sqrt", "rms_pow")


@dataclass(frozen=True)
class NormRecipe:
    """One normalisation over the last dimension.

    `weight` and `bias`: whether there is one; `one_plus`: scales by (1 + weight), as Gemma does (by hand
    only); `float32`: computes in fp32 and casts back (by hand only).
    """

    kind: NormKind = "layer"
    weight: bool = True
    bias: bool = True
    one_plus: bool = False
    float32: bool = False
    eps: float = 1e-5

    @property
    def by_hand(self) -> bool:
        """Whether it is spelled out in pointwise operations and a mean."""
        return self.kind not in ("layer", "rms")

    def make(self, dim: int) -> nn.Module:
        """A fresh module over a last dimension of size `dim`."""
        if self.kind == "layer":
            return nn.LayerNorm(dim, eps=self.eps, elementwise_affine=self.weight, bias=self.bias)
        if self.kind == "rms":
            return nn.RMSNorm(dim, eps=self.eps, elementwise_affine=self.weight)
        return NormByHand(self, dim)


class NormByHand(nn.Module):
    """A normalisation written out, as most model files do."""

    def __init__(self, recipe: NormRecipe, dim: int) -> None:
        super().__init__()
        self.recipe = recipe
        start = torch.zeros(dim) if recipe.one_plus else torch.ones(dim)
        self.weight = nn.Parameter(start) if recipe.weight else None
        has_bias = recipe.weight and recipe.bias and recipe.kind == "layer_by_hand"
        self.bias = nn.Parameter(torch.zeros(dim)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D], the same dtype."""
        dtype = x.dtype
        y = self._scaled(x.float() if self.recipe.float32 else x).to(dtype)
        if self.weight is not None:
            y = y * (1.0 + self.weight) if self.recipe.one_plus else self.weight * y
        return y if self.bias is None else y + self.bias

    def _scaled(self, x: Tensor) -> Tensor:
        kind, eps = self.recipe.kind, self.recipe.eps
        if kind == "layer_by_hand":
            centred = x - x.mean(-1, keepdim=True)
            return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
        if kind == "rms_rsqrt":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        if kind == "rms_sqrt":
            return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)
        return x * (x.square().mean(-1, keepdim=True) + eps) ** -0.5
