"""A GPT with everything written out, as model files often have it: norms, activations, attention, masks.

Grouped heads, transposed weights, a window, and a mask of its own in every layer. The documents show, pass by
pass, what `moec` makes of each of these spellings. Shapes as in `gpt.py`; G groups of heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square, and a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = x_BSD * torch.rsqrt(x_BSD.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * y_BSD


class Conv1D(nn.Module):
    """A product whose matrix lies the other way round, as in GPT-2's code."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_in, num_out) * 0.02)
        self.bias = nn.Parameter(torch.zeros(num_out))

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        return torch.addmm(self.bias, x_BSD.view(-1, D), self.weight).view(B, S, -1)


class Attention(nn.Module):
    """Self-attention over the last few tokens, product by product; groups of heads share keys and values."""

    def __init__(self, width: int, heads: int, groups: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, groups * self.size, bias=False)
        self.v = nn.Linear(width, groups * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def _repeated(self, x_BSD: Tensor) -> Tensor:
        B, S, _ = x_BSD.shape
        x = x_BSD.view(B, S, self.groups, self.size).transpose(1, 2)  # [B, G, S, size]
        x = x[:, :, None].expand(B, self.groups, self.heads // self.groups, S, self.size)
        return x.reshape(B, self.heads, S, self.size)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        q = self.q(x_BSD).view(B, S, self.heads, self.size).transpose(1, 2)
        k, v = self._repeated(self.k(x_BSD)), self._repeated(self.v(x_BSD))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(self.size)
        seen = torch.tril(torch.ones(S, S, dtype=torch.bool, device=x_BSD.device))
        seen = torch.triu(seen, diagonal=1 - self.window)
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return self.out((shares @ v).transpose(1, 2).reshape(B, S, D))


class MLP(nn.Module):
    """A feed-forward with GELU as a formula."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = Conv1D(width, 4 * width), Conv1D(4 * width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h = self.up(x_BSD)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return self.down(h)


class Block(nn.Module):
    """Attention and feed-forward, added in place."""

    def __init__(self, width: int, heads: int, groups: int, window: int) -> None:
        super().__init__()
        self.norm_1, self.attention = RMSNorm(width), Attention(width, heads, groups, window)
        self.norm_2, self.mlp = RMSNorm(width), MLP(width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD += self.dropout(self.attention(self.norm_1(x_BSD)))
        x_BSD += self.dropout(self.mlp(self.norm_2(x_BSD)))
        return x_BSD


class GPT(nn.Module):
    """Tokens `i64[B, S]` in, logits `[B, S, V]` of the token after each one out."""

    def __init__(self, layers: int, vocab: int = 256, width: int = 32) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads=4, groups=2, window=8) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x_BSD = self.token_embedding(tokens)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))
