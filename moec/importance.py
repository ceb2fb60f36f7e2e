"""How much each layer changes the residual stream, measured on text: block influence.

    influence of a layer = 1 - mean over tokens of cos(what enters it, what leaves it)

A layer that hardly turns what goes through it is one that a student can do without.

Source: ShortGPT, arXiv 2403.03853, section 3.1, equation 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moec.errors import DataError, PassError
from moec.passes.blocks import Block, blocks_of
from moec.program import Program
from moec.runtime.ops.registry import wide
from moec.runtime.rng import borrowed_rng
from moec.runtime.trainable import in_mode


@dataclass(frozen=True)
class Influence:
    """The influence of one layer: `value`, and its `rank` among all (0: the most important). `layer` counts
    from 0; `path` is the user's module path, '' where the model has none. Prints as a row."""

    layer: int
    path: str
    value: float
    rank: int

    def __str__(self) -> str:
        return f"{self.layer:>5}  {self.value:9.6f}  {self.rank:>4}  {self.path}".rstrip()


def block_influence(program: Program, tokens: Tensor, *, rows: int = 8) -> list[float]:
    """The influence of each layer of `program`, in order, on tokens i64 [B, S]; `rows` of them at a time.

    The program is run in evaluation mode without gradients, and left as it was: mode and random state too.
    Similarities are computed in fp32 at least and averaged in fp64 over all B · S positions; what is held is
    the states of `rows` sequences. Raises `PassError` for a program whose layers cannot be told (see
    `moec.passes.blocks`), or that is one rank's: the whole one measures; `DataError` for tokens that are no
    text of the program.
    """
    blocks = _blocks(program)
    _require_tokens(program, tokens, rows)
    device = next((value.device for value in program.parameters()), tokens.device)
    sums = torch.zeros(len(blocks), dtype=torch.float64)
    with torch.no_grad(), in_mode(program, training=False), borrowed_rng(device):
        for batch in tokens.split(rows):
            reading = _Reading(program.graph, blocks)
            reading.run(batch.to(device))
            sums += torch.tensor(reading.similarities, dtype=torch.float64)
    return [1.0 - float(total) / tokens.numel() for total in sums]


def influences(program: Program, tokens: Tensor, *, rows: int = 8) -> list[Influence]:
    """`block_influence` as a table: one row for each layer, in order."""
    values = block_influence(program, tokens, rows=rows)
    order = sorted(range(len(values)), key=lambda layer: (-values[layer], layer))
    paths = [block.path for block in blocks_of(program.graph)]
    return [Influence(i, paths[i], value, order.index(i)) for i, value in enumerate(values)]


def influence_table(rows: Sequence[Influence]) -> str:
    """The rows under a heading."""
    return "\n".join(["layer  influence  rank", *map(str, rows)])


def _blocks(program: Program) -> list[Block]:
    if program.rank is not None:
        found = f"the program of rank {program.rank}"
        raise PassError("block_influence", found, "the whole program: importance is measured before ranks")
    if program.stage == "cached":
        raise PassError("block_influence", "a program that decodes", "the one it was derived from")
    return blocks_of(program.graph)


def _require_tokens(program: Program, tokens: Tensor, rows: int) -> None:
    program._check(tokens)
    vocabulary, highest = program.source.vocabulary, int(tokens.max())
    if highest >= vocabulary or int(tokens.min()) < 0:
        raise DataError("block_influence: tokens", f"token {highest}", f"tokens from 0 to {vocabulary - 1}")
    if rows < 1:
        raise DataError("block_influence: rows", f"{rows}", "at least one sequence at a time")


class _Reading(fx.Interpreter):
    """Runs a root graph and compares each block's exit with its entry as soon as there is one.

    `similarities`: by block, the sum over positions of the cosines. Values are let go after their last use.
    """

    def __init__(self, root: fx.GraphModule, blocks: Sequence[Block]) -> None:
        super().__init__(root)
        self.blocks = blocks
        self.entries: dict[fx.Node, Tensor] = {}
        self.similarities = [0.0] * len(blocks)

    def run_node(self, n: fx.Node) -> object:
        """The node's value, compared where it is an exit, remembered until the next exit where an entry."""
        value = super().run_node(n)
        for block in self._ending(n):
            entered = self.entries.pop(block.entry)
            self.similarities[block.index] = _cosines(entered, value)
        if any(n is block.entry for block in self.blocks):
            self.entries[n] = value
        return value

    def _ending(self, n: fx.Node) -> Iterator[Block]:
        return (block for block in self.blocks if block.exit is n)


def _cosines(entered_BSD: Tensor, left_BSD: Tensor) -> float:
    """The sum over positions of the cosines; that of a zero vector is zero."""
    entered_BSD, left_BSD = (value.to(wide(value.dtype)) for value in (entered_BSD, left_BSD))
    return float(torch.cosine_similarity(entered_BSD, left_BSD, dim=-1).double().sum())
