"""Feed a program that remembers: tokens in steps of any sizes, its answers put together row by row.

What a *cached* program must do is said by the program it was derived from: fed in any steps, each row gives
the logits that the whole row gives at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from .inputs import Input, factors

Steps = Sequence[Sequence[int]]
"""How many new tokens each row gets, step by step."""

StepFunction = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(tokens [B, n], past [B], wanted [B, m], length) → logits [B, m, V]."""


def fed(step: StepFunction, tokens_BS: Tensor, steps: Steps) -> list[Tensor]:
    """Feed row b of `tokens_BS` its next `steps[i][b]` tokens in step i; logits [fed, V] of each row.

    Rows that get fewer than the longest are padded on the right with other tokens than theirs, as a ragged
    batch is, so that reading the padding shows.
    """
    past = [0] * tokens_BS.shape[0]
    found: list[list[Tensor]] = [[] for _ in past]
    for counts in steps:
        new = torch.stack([_next(row, first, max(counts), count) for row, first, count in zip(
            tokens_BS, past, counts, strict=True)])  # fmt: skip
        wanted = torch.arange(max(counts), device=new.device).expand(len(past), -1)
        logits = step(new, torch.tensor(past, device=new.device), wanted, max(past) + max(counts))
        for row, count in enumerate(counts):
            found[row].append(logits[row, :count])
            past[row] += count
    return [torch.cat(parts) for parts in found]


def _next(row_S: Tensor, first: int, width: int, count: int) -> Tensor:
    """`count` tokens of a row from `first` on, and others to fill up `width`."""
    padding = (row_S[:1] + 1 + torch.arange(width - count, device=row_S.device)) % (row_S.max() + 1)
    return torch.cat([row_S[first : first + count], padding])


class Remembering:
    """A root at stage *cached* with memory of its own: a `StepFunction` for `rows` rows of `length`
    positions.

    `dtype`: of the floating caches, where the root was converted to another (`in_dtype`).
    """

    def __init__(
        self, root: fx.GraphModule, rows: int, length: int, dtype: torch.dtype | None = None
    ) -> None:
        self.root = root
        places = [node for node in root.graph.nodes if node.op == "placeholder"][3:]
        records: list[Input] = [node.meta["input"] for node in places]
        some = next(iter([*root.parameters(), *root.buffers()]), torch.zeros(()))
        self.dims = [record.sizes.index("L") for record in records]
        sizes = {"B": rows, "L": length}
        self.caches = [_zeros(record, sizes, dtype, some.device) for record in records]

    def __call__(self, tokens: Tensor, past: Tensor, wanted: Tensor, length: int) -> Tensor:
        caches = [cache.narrow(dim, 0, length) for cache, dim in zip(self.caches, self.dims, strict=True)]
        logits: Tensor = self.root(tokens, past, wanted, *caches)
        return logits


def _zeros(record: Input, sizes: dict[str, int], dtype: torch.dtype | None, device: torch.device) -> Tensor:
    shape = []
    for size in record.sizes:
        count, letter = (size, "") if isinstance(size, int) else factors(size)
        shape.append(count * sizes.get(letter, 1))
    widened = dtype if dtype is not None and record.dtype.is_floating_point else record.dtype
    return torch.zeros(shape, dtype=widened, device=device)
