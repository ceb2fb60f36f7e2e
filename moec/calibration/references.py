"""The programs whose operators are timed: small decoders, dense and sparse, as plain PyTorch writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.program import Program

PLANS: Mapping[str, dict[str, Any] | None] = {
    "dense": None,
    "top-1": {"moe": {"experts": 6, "layers": "1::2", "top_k": 1, "residual": "learned"}},
    "top-2": {"moe": {"experts": 5, "layers": "1::2", "top_k": 2}},
    "gated": None,
}
GATED = "gated"


@dataclass(frozen=True)
class Shape:
    """One reference program and the batch that it is timed on; `past`: positions a decoder remembers."""

    width: int
    heads: int
    vocabulary: int
    batch: int
    sequence: int
    past: int


SHAPES: Sequence[Shape] = (
    Shape(40, 2, 200, 1, 12, 40),
    Shape(96, 4, 700, 3, 40, 150),
    Shape(208, 4, 2500, 6, 72, 300),
    Shape(416, 8, 4500, 6, 150, 500),
)
QUICK: Sequence[Shape] = (Shape(32, 2, 150, 2, 16, 32),)


class _Block(nn.Module):
    """Attention and a feed-forward, of GPT's kind or (`gated`) of Llama's."""

    def __init__(self, width: int, heads: int, gated: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.gated = heads, gated
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.norm_1, self.norm_2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gate = nn.Linear(width, 4 * width) if gated else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.dropout(self._attend(self.norm_1(x_BSD)))
        h_BSD = self.norm_2(x_BSD)
        if self.gate is None:
            return x_BSD + self.dropout(self.down(F.gelu(self.up(h_BSD))))
        return x_BSD + self.dropout(self.down(F.silu(self.gate(h_BSD)) * self.up(h_BSD)))

    def _attend(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        qkv = self.qkv(x_BSD).view(B, S, 3 * self.heads, D // self.heads).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, S, D))


class ReferenceDecoder(nn.Module):
    """Tokens i64 [B, S] in, logits [B, S, V] out: two blocks, the second one sparse under the plans."""

    def __init__(self, shape: Shape, gated: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(max(shape.sequence, shape.past) + 8, shape.width)
        self.blocks = nn.ModuleList(_Block(shape.width, shape.heads, gated, dropout) for _ in range(2))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x_BSD = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))


AXES = ("expert", "tensor")


def placed(shape: Shape, axis: str, ranks: int) -> Program:
    """A reference whose experts, or else heads, channels and words, are dealt out to `ranks` ranks."""
    torch.manual_seed(0)
    moe = {"moe": {"experts": 2 * ranks, "layers": "1::2", "top_k": 2}} if axis == "expert" else {}
    plan = moe | {"parallel": {axis: ranks}}
    return moec.compile(ReferenceDecoder(shape), plan, verify="off", world=ranks)


def references(shapes: Sequence[Shape], names: Sequence[str]) -> Iterator[tuple[str, Shape, Program]]:
    """(name, shape, program) of every reference, eager; each is made when it is asked for.

    `names`: plans among `PLANS`; `gated` is the dense program of the other kind, in its two extreme sizes.
    """
    for shape in shapes:
        for name in names:
            gated = name == GATED
            if not gated or shape in (shapes[0], shapes[-1]):
                torch.manual_seed(0)
                # Where routers choose, nothing is random: for new numbers of rows new kernels are made.
                model = ReferenceDecoder(shape, gated, 0.0 if PLANS[name] else 0.1)
                yield name, shape, moec.compile(model, PLANS[name], verify="off")
