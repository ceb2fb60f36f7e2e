"""A tiny model, with dropout (which draws random numbers on every rank) or without."""

from __future__ import annotations

from examples.gpt import GPT, GPTConfig


def gpt(dropout: float = 0.1, layers: int = 2) -> GPT:
    """The example's GPT, small enough to be started often."""
    return GPT(GPTConfig(vocab=256, seq=16, layers=layers, width=8, heads=2, dropout=dropout))
