"""Tiny models for the command line, named as `models.py:gpt` and the like."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.gpt import GPT, MLP, GPTConfig


def gpt(layers: int = 2, vocab: int = 256, hidden: int = 0) -> GPT:
    """The example's GPT, small enough for a test; `hidden`: width of its feed-forwards."""
    model = GPT(GPTConfig(vocab=vocab, seq=16, layers=layers, width=8, heads=2))
    for block in model.blocks:
        mlp = block.get_submodule("mlp")
        assert isinstance(mlp, MLP)
        if hidden:
            mlp.up, mlp.down = nn.Linear(8, hidden), nn.Linear(hidden, 8)
    return model


class Bare(nn.Module):
    """An embedding, a feed-forward and a head."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return nn.functional.linear(x + self.down(self.up(x).relu()), self.embedding.weight)


class FixedPositions(Bare):
    """Adds a table of exactly five positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(self.embedding(tokens) + self.table, self.embedding.weight)


ready = Bare()
number = 3


def broken() -> nn.Module:
    """A factory with a mistake of the user's in it."""
    return nn.Linear(3, "four")  # type: ignore[arg-type]


def careless() -> None:
    """A factory that forgets to return."""
    Bare()
