"""What the inputs of a root graph are like: `tokens` alone, or also what a decoder is given.

A placeholder without a record is `tokens` i64 [B, S]. The root of a decoder has more: each carries `Input`
under `node.meta["input"]`, its sizes spelled `"B"`, `"n"`, `"4*B"` or as plain numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

# Sample sizes behind the symbols: they differ from each other and from 1, and fit any position table.
SAMPLES = {"B": 2, "S": 3, "n": 3, "m": 5, "L": 7}


@dataclass(frozen=True)
class Input:
    """Sizes and dtype of one input; equal letters are equal sizes."""

    sizes: tuple[int | str, ...]
    dtype: torch.dtype = torch.int64


TOKENS = Input(("B", "S"))


def factors(size: str) -> tuple[int, str]:
    """`"4*B"` → (4, "B"); `"B"` → (1, "B")."""
    count, _, letter = size.rpartition("*")
    return int(count or 1), letter


def inputs_of(graph: fx.Graph) -> tuple[Input, ...]:
    """The records of all inputs, in order."""
    return tuple(node.meta.get("input", TOKENS) for node in graph.nodes if node.op == "placeholder")
