"""What a decoder knows of positions: rotary tables, ALiBi biases and causal masks, in several spellings.

Everything here depends on positions only, never on token values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .attention import AttentionRecipe

Positions = Literal[
    "learned", "learned_parameter", "rotary_half", "rotary_pairs", "rotary_complex", "alibi", "none"
]
POSITIONS: tuple[Positions, ...] = (
    "learned", "rotary_half", "rotary_pairs", "alibi", "none", "learned_parameter", "rotary_complex",
)  # fmt: skip
MaskSpelling = Literal["tril", "buffer", "arange", "triu"]
MASK_SPELLINGS: tuple[MaskSpelling, ...] = ("tril", "buffer", "arange", "triu")
Rotary = tuple[Tensor, Tensor]


class PositionTables(nn.Module):
    """Makes, for S positions, the rotary pair (cos, sin) [S, R/2], the ALiBi bias [H, S, S], the mask [S, S].

    Each is None where the attention has no use for it. With `stored_tables` the rotary pair is a buffer that
    is sliced; otherwise it is computed from the frequencies in every call.
    """

    keep: Tensor
    cos: Tensor
    sin: Tensor
    frequencies: Tensor
    slopes: Tensor

    def __init__(self, recipe: AttentionRecipe, positions: Positions, max_positions: int) -> None:
        super().__init__()
        self.recipe, self.positions = recipe, positions
        if recipe.mask == "buffer" and recipe.needs_mask:
            keep = torch.tril(torch.ones(max_positions, max_positions, dtype=torch.bool))
            self.register_buffer("keep", keep, persistent=False)
        if positions == "alibi":
            slopes = 2.0 ** (-8.0 * torch.arange(1, recipe.num_heads + 1) / recipe.num_heads)
            self.register_buffer("slopes", slopes, persistent=False)
        if positions.startswith("rotary"):
            self._add_rotary(max_positions)

    def _add_rotary(self, max_positions: int) -> None:
        dim = self.recipe.rotary_dim
        frequencies = 100.0 ** (-torch.arange(0, dim, 2).float() / dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        if self.recipe.stored_tables:
            angles = torch.arange(max_positions).float()[:, None] * frequencies[None, :]
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, like: Tensor) -> tuple[Rotary | None, Tensor | None, Tensor | None]:
        """like [B, S, D]: only its size, dtype and device are read. Returns (rotary, bias, mask)."""
        rotary = self._rotary(like) if self.positions.startswith("rotary") else None
        bias = self._alibi(like) if self.positions == "alibi" else None
        return rotary, bias, self._mask(like) if self.recipe.needs_mask else None

    def _rotary(self, like: Tensor) -> Rotary:
        length = like.size(1)
        if self.recipe.stored_tables:
            return self.cos[:length].to(like.dtype), self.sin[:length].to(like.dtype)
        where = torch.arange(length, device=like.device, dtype=self.frequencies.dtype)
        angles = torch.outer(where, self.frequencies)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def _alibi(self, like: Tensor) -> Tensor:
        where = torch.arange(like.size(1), device=like.device)
        distance = where[None, :] - where[:, None]
        return (self.slopes[:, None, None] * distance[None]).to(like.dtype)

    def _mask(self, like: Tensor) -> Tensor:
        length, device = like.size(1), like.device
        where = torch.arange(length, device=device)
        if self.recipe.mask == "buffer":
            keep = self.keep[:length, :length]
        elif self.recipe.mask == "tril":
            keep = torch.tril(torch.ones(length, length, dtype=torch.bool, device=device))
        elif self.recipe.mask == "triu":
            keep = ~torch.triu(torch.ones(length, length, device=device), diagonal=1).bool()
        else:
            keep = where[:, None] >= where[None, :]
        window = self.recipe.window
        return keep if window is None else keep & (where[:, None] - where[None, :] < window)


def rotate(x_BHSD: Tensor, rotary: Rotary, positions: Positions) -> Tensor:
    """Turn the first R channels of x [B, H, S, D] by `rotary` (cos and sin, [S, R/2]); keep the rest."""
    dim = 2 * rotary[0].size(-1)
    if dim == x_BHSD.size(-1):
        return _TURNS[positions](x_BHSD, *rotary)
    turned, kept = x_BHSD[..., :dim], x_BHSD[..., dim:]
    return torch.cat((_TURNS[positions](turned, *rotary), kept), dim=-1)


def _turn_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    left, right = x[..., : x.size(-1) // 2], x[..., x.size(-1) // 2 :]
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    swapped = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + swapped * sin


def _turn_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * torch.complex(cos.float(), sin.float())
    return torch.view_as_real(turned).flatten(-2).type_as(x)


_TURNS = {"rotary_half": _turn_half, "rotary_pairs": _turn_pairs, "rotary_complex": _turn_complex}
