"""Causal self-attention in the spellings people use: fused or separate qkv, sdpa or eager, grouped heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import NormRecipe
from .positions import MaskSpelling, Positions, PositionTables, Rotary, rotate
from .projections import ProjectionNames, Spelling, add_projection, project, projection_names

AttentionKind = Literal[
    "sdpa_causal", "sdpa_mask", "sdpa_bias", "eager_add", "eager_masked_fill", "eager_where", "eager_einsum"
]
ATTENTION_KINDS: tuple[AttentionKind, ...] = (
    "sdpa_causal", "sdpa_mask", "sdpa_bias", "eager_add", "eager_masked_fill", "eager_where", "eager_einsum",
)  # fmt: skip
Qkv = Literal["separate", "split", "chunk", "view", "heads", "groups"]
Repeat = Literal["expand", "repeat_interleave", "enable_gqa"]


@dataclass(frozen=True)
class AttentionRecipe:
    """One spelling of attention. `num_heads` is a multiple of `num_kv_heads`; `rotary_dim` is even.

    `qkv`: separate projections, or one projection taken apart by `split` sizes, `chunk`, `view`+`unbind`, per
    head (`heads`, GPT-NeoX) or per group of heads (`groups`, Falcon). `window`: how far back a token sees.
    """

    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 4
    rotary_dim: int = 4
    kind: AttentionKind = "sdpa_causal"
    mask: MaskSpelling = "tril"
    fill: float = -math.inf
    qkv: Qkv = "separate"
    repeat: Repeat = "expand"
    bias: bool = True
    out_bias: bool = True
    spelling: Spelling = "module"
    scale: float | None = None
    softcap: float | None = None
    qk_norm: NormRecipe | None = None
    softmax_float32: bool = False
    stored_tables: bool = False
    dropout: float = 0.0
    window: int | None = None

    @property
    def needs_mask(self) -> bool:
        """Whether a mask tensor is made (sdpa with `is_causal` makes none)."""
        return self.kind != "sdpa_causal"

    @property
    def widths(self) -> tuple[int, int, int]:
        """Output widths of q, k and v."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    def projections(self, d_model: int) -> dict[str, tuple[int, int, bool]]:
        """Name → (in, out, bias) of every projection."""
        widths = dict(zip(("q", "k", "v"), self.widths, strict=True))
        inner = widths if self.qkv == "separate" else {"qkv": sum(widths.values())}
        table = {name: (d_model, width, self.bias) for name, width in inner.items()}
        return table | {"out": (widths["q"], d_model, self.out_bias)}

    def names(self, prefix: str) -> dict[str, ProjectionNames]:
        """Ground truth: the parameters of every projection of an attention at the path `prefix`."""
        return {
            name: projection_names(prefix, name, bias=bias, spelling=self.spelling)
            for name, (_, _, bias) in self.projections(1).items()
        }


class Attention(nn.Module):
    """x [B, S, D] → [B, S, D], causal."""

    def __init__(
        self, recipe: AttentionRecipe, d_model: int, positions: Positions, max_positions: int
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.positions: Positions = positions
        for name, (num_in, num_out, bias) in recipe.projections(d_model).items():
            add_projection(self, name, num_in, num_out, bias=bias, spelling=recipe.spelling)
        if recipe.qk_norm is not None:
            self.q_norm, self.k_norm = (
                recipe.qk_norm.make(recipe.head_dim),
                recipe.qk_norm.make(recipe.head_dim),
            )
        self.tables = PositionTables(recipe, positions, max_positions)

    def _project(self, name: str, x: Tensor, bias: bool) -> Tensor:
        return project(self, name, x, bias=bias, spelling=self.recipe.spelling)

    def forward(
        self, x_BSD: Tensor, tables: tuple[Rotary | None, Tensor | None, Tensor | None] | None = None
    ) -> Tensor:
        """`tables`: what `PositionTables` returned, when the model makes them once for all layers."""
        rotary, bias, keep = self.tables(x_BSD) if tables is None else tables
        q, k, v = self._heads(x_BSD)
        if self.recipe.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary, self.positions), rotate(k, rotary, self.positions)
        mixed = self._attend(q, k, v, bias, keep)
        merged = mixed.transpose(1, 2).reshape(x_BSD.size(0), x_BSD.size(1), self.recipe.widths[0])
        return self._project("out", merged, self.recipe.out_bias)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r = self.recipe
        if r.qkv == "separate":
            parts = [self._project(name, x, r.bias) for name in ("q", "k", "v")]
        else:
            parts = self._take_apart(self._project("qkv", x, r.bias))
        q, k, v = (p.view(x.size(0), x.size(1), -1, r.head_dim).transpose(1, 2) for p in parts)
        return q, k, v

    def _take_apart(self, qkv: Tensor) -> list[Tensor]:
        r, lead = self.recipe, qkv.shape[:2]
        if r.qkv == "split":
            return list(qkv.split(list(r.widths), dim=-1))
        if r.qkv == "chunk":
            return list(qkv.chunk(3, dim=-1))
        if r.qkv == "view":
            return list(qkv.view(*lead, 3, r.num_heads, r.head_dim).unbind(2))
        if r.qkv == "heads":
            return list(qkv.view(*lead, r.num_heads, 3 * r.head_dim).chunk(3, dim=-1))
        groups = qkv.view(*lead, r.num_kv_heads, r.num_heads // r.num_kv_heads + 2, r.head_dim)
        return [groups[:, :, :, :-2].flatten(2, 3), groups[:, :, :, -2], groups[:, :, :, -1]]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
        r = self.recipe
        sdpa = r.kind.startswith("sdpa")
        native = sdpa and r.repeat == "enable_gqa" and r.num_heads != r.num_kv_heads
        if r.num_heads != r.num_kv_heads and not native:
            k, v = self._repeated(k), self._repeated(v)
        if not sdpa:
            return self._eager(q, k, v, bias, keep)
        mask = self._added_mask(q, bias, keep) if r.kind == "sdpa_bias" else keep
        drop = r.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, mask, drop, is_causal=r.kind == "sdpa_causal", scale=r.scale, enable_gqa=native
        )

    def _repeated(self, x_BGSD: Tensor) -> Tensor:
        times = self.recipe.num_heads // self.recipe.num_kv_heads
        if self.recipe.repeat == "repeat_interleave":
            return x_BGSD.repeat_interleave(times, dim=1)
        B, G, S, D = x_BGSD.shape
        return x_BGSD[:, :, None].expand(B, G, times, S, D).reshape(B, G * times, S, D)

    def _added_mask(self, like: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
        assert keep is not None
        zeros = torch.zeros(keep.shape, dtype=like.dtype, device=like.device)
        mask = zeros.masked_fill(~keep, self._fill(like))
        return mask if bias is None else bias + mask

    def _fill(self, like: Tensor) -> float:
        return (
            max(self.recipe.fill, torch.finfo(like.dtype).min) if self.recipe.fill > -math.inf else -math.inf
        )

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
        assert keep is not None
        r = self.recipe
        scale = r.head_dim**-0.5 if r.scale is None else r.scale
        if r.kind == "eager_einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
        elif r.kind == "eager_where":
            scores = (q * scale) @ k.transpose(-2, -1)
        else:
            scores = torch.matmul(q, k.transpose(-2, -1)) / (1.0 / scale)
        if r.softcap is not None:
            scores = r.softcap * torch.tanh(scores / r.softcap)
        weights = self._softmax(self._masked(scores, bias, keep))
        weights = F.dropout(weights, r.dropout, self.training)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v) if r.kind == "eager_einsum" else weights @ v

    def _masked(self, scores: Tensor, bias: Tensor | None, keep: Tensor) -> Tensor:
        r = self.recipe
        if r.kind in ("eager_add", "eager_einsum"):
            return scores + self._added_mask(scores, bias, keep)
        scores = scores if bias is None else scores + bias
        if r.kind == "eager_masked_fill":
            return scores.masked_fill(keep == 0, self._fill(scores))
        fill = torch.full([], self._fill(scores), dtype=scores.dtype, device=scores.device)
        return torch.where(keep, scores, fill)

    def _softmax(self, scores: Tensor) -> Tensor:
        if not self.recipe.softmax_float32:
            return torch.softmax(scores, dim=-1)
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
