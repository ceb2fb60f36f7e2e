"""An ordinary GPT: a plain, dense, decoder-only transformer in plain PyTorch.

Shapes: B sequences of S tokens, width D, vocabulary V. Nothing in this file knows what will become of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model; `seq` is the longest sequence it has positions for."""

    vocab: int
    seq: int
    layers: int
    width: int
    heads: int
    dropout: float = 0.1


class Attention(nn.Module):
    """Causal self-attention: each token looks at itself and at what came before."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        q, k, v = self.qkv(x_BSD).view(B, S, 3 * self.heads, D // self.heads).transpose(1, 2).chunk(3, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, S, D))


class MLP(nn.Module):
    """The feed-forward: four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSD)))


class Block(nn.Module):
    """Attention, then the feed-forward, each normalised before and added after."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(config.width), Attention(config)
        self.norm_2, self.mlp = nn.LayerNorm(config.width), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.dropout(self.attention(self.norm_1(x_BSD)))
        return x_BSD + self.dropout(self.mlp(self.norm_2(x_BSD)))


class GPT(nn.Module):
    """Tokens `i64[B, S]` in, logits `[B, S, V]` of the token after each one out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.position_embedding = nn.Embedding(config.seq, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.token_embedding.weight
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """GPT-2's: normal, 0.02; what writes into the residual stream is scaled down by its depth."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            for linear in (module.attention.out, module.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / (2 * self.config.layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x_BSD = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))


def small() -> GPT:
    """The size of the demo: bytes in, bytes out; trains in minutes on two cores.

    Short sequences and no dropout: with a few million bytes to learn from, it sees none of them twice.
    """
    return GPT(GPTConfig(vocab=256, seq=64, layers=4, width=96, heads=3, dropout=0.0))


def gpt_350m() -> GPT:
    """The paper's 350M, built on the default device: under `torch.device("meta")` it takes no memory."""
    return GPT(GPTConfig(vocab=50257, seq=2048, layers=24, width=1024, heads=16))


def gpt_1_3b() -> GPT:
    """The paper's 1.3B, built on the default device: under `torch.device("meta")` it takes no memory."""
    return GPT(GPTConfig(vocab=50257, seq=2048, layers=24, width=2048, heads=16))
