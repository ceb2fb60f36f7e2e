"""What the positions of a program look like: its position-only values, evaluated.

The region is run, not read: whatever the spelling, a learned embedding, a rotary table, a bias or a mask is
the numbers it gives. Those of a longer sequence must begin with those of a shorter one, and be the same for
every row of the batch, or else no table is the same for all lengths, and the program is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from moec.errors import PassError
from moec.ir.graphs import output

from .position_axes import HIDDEN
from .position_shapes import Shown, shown

REFUSAL = "derive_cache: positions"
# Numbers in one value that are made at a time: masks over more positions are made for fewer, and continued.
BUDGET = 1 << 26


class PositionTables:
    """Results of the positions region for a sequence of `length`, and for shorter ones to compare with.

    `dims`: for each result, its dims that run over positions. `shifted`: results over keys that differ
    between lengths by one number for all keys, which a softmax does not see; they begin at 0 here.
    """

    def __init__(
        self,
        region: fx.GraphModule | None,
        dims: Sequence[tuple[int, ...]],
        length: int,
        device: torch.device,
    ) -> None:
        self.length, self.dims, self.region, self.device = max(length, 2), dims, region, device
        self.shifted: set[int] = set()
        self.side = self.length if region is None else self._side(region)
        self.values: list[Tensor | None] = [] if region is None else self._all(region)
        shorter = sorted({n for n in (2, 3, self.side // 2, self.side - 1) if 2 <= n < self.side})
        for n in shorter if region is not None else ():
            self._compare(self._evaluated(region, n, rows=2), n)  # type: ignore[arg-type]
        for index in self.shifted:
            value = self.values[index]
            assert value is not None
            start = value[..., -1:, :1] if len(self.dims[index]) == 2 else value[..., :1]
            self.values[index] = value - start

    # evaluation

    def _side(self, region: fx.GraphModule) -> int:
        """The most positions for which every mask over pairs of them fits the budget."""
        small = self._evaluated(region, 2)
        squares = [
            v.numel() // 4
            for v, dims in zip(small, self.dims, strict=True)
            if v is not None and len(dims) > 1
        ]
        side = int((BUDGET / max(squares)) ** 0.5) if squares else self.length
        return max(min(side, self.length), 2)

    def _all(self, region: fx.GraphModule) -> list[Tensor | None]:
        if self.side == self.length:
            return self._evaluated(region, self.length)
        rows = [index for index, dims in enumerate(self.dims) if len(dims) < 2]
        long = dict(zip(rows, self._evaluated(_only(region, rows), self.length), strict=True))
        squares = self._evaluated(region, self.side)
        return [long.get(index, value) for index, value in enumerate(squares)]

    def _evaluated(self, region: fx.GraphModule, length: int, rows: int = 1) -> list[Tensor | None]:
        try:
            with torch.no_grad():
                found = region(torch.zeros(rows, length, dtype=torch.long, device=self.device))
        except (IndexError, RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise PassError(
                REFUSAL, f"no values for {length} positions: {first}", "fewer positions"
            ) from None
        values = list(found) if isinstance(found, tuple | list) else [found]
        if any(isinstance(value, Tensor) and value.is_meta for value in values):
            raise PassError(REFUSAL, "values without numbers, on 'meta'", "a program with its weights")
        return [value.detach() if isinstance(value, Tensor) else None for value in values]

    # the same for all lengths and rows

    def _compare(self, shorter: list[Tensor | None], n: int) -> None:
        for index, (value, known) in enumerate(zip(shorter, self.values, strict=True)):
            if value is None or known is None:
                continue
            known = self._start(known, index, n)
            self._check_rows(value, known, index)
            if torch.equal(value, known.expand_as(value)):
                continue
            if not self._moved(value, known, index):
                raise PassError(
                    REFUSAL,
                    f"result {index} differs between {n} and {self.length} positions, or between rows",
                    "values that depend on neither",
                    "program(tokens) recomputes",
                )
            self.shifted.add(index)

    def _start(self, known: Tensor, index: int, n: int) -> Tensor:
        """The first `n` positions of result `index`."""
        for dim in self.dims[index]:
            if known.shape[dim] not in (self.length, self.side):
                found = f"result {index} has {known.shape[dim]} positions of {self.length}"
                raise PassError(REFUSAL, found, "fewer positions")
            known = known.narrow(dim, 0, n)
        return known

    def _check_rows(self, value: Tensor, known: Tensor, index: int) -> None:
        """Made for two rows of a batch, `value` may be twice what it is for one, and no more."""
        sizes = zip(known.shape, value.shape, strict=False)
        if value.dim() != known.dim() or any(one not in (1, two) for one, two in sizes):
            shapes = f"{list(value.shape)} for two rows of a batch, {list(known.shape)} for one"
            raise PassError(
                REFUSAL, f"result {index}: {shapes}", "values that are the same for every row of a batch"
            )

    def _moved(self, value: Tensor, known: Tensor, index: int) -> bool:
        """Whether two values differ by one number for all keys that are seen: a bias counted from the end."""
        dims = self.dims[index]
        if not value.is_floating_point() or not dims or dims[-1] != value.dim() - 1 or len(dims) > 2:
            return False
        if len(dims) == 2 and (dims[0] != value.dim() - 2 or not self.hides(index)):
            return False
        hidden = known <= HIDDEN if len(dims) == 2 else torch.zeros_like(known, dtype=torch.bool)
        moved = (value - known).masked_fill(hidden, 0.0)
        first = moved[..., :1, :1] if len(dims) == 2 else moved[..., :1]
        largest = float(known[~hidden].abs().max()) + 1
        return torch.allclose(moved, first.masked_fill(hidden, 0.0), rtol=0.0, atol=1e-6 * largest)

    # what they say

    def later(self) -> dict[int, float]:
        """The number of each result at positions after its own, where that is one number (or hides them); the
        number itself of one that is a single number."""
        found = {index: self._later(index) for index in range(len(self.values))}
        return {index: number for index, number in found.items() if number is not None}

    def _later(self, index: int) -> float | None:
        value, dims = self.values[index], self.dims[index]
        if value is None or value.dtype.is_complex:
            return None
        if not dims:
            return float(value) if value.numel() == 1 else None
        if not self._square(index):
            return None
        above = self._above(value)
        if bool((above == above.flatten()[0]).all()):
            return float(above.flatten()[0])
        return float(above.max()) if self.hides(index) else None

    def _square(self, index: int) -> bool:
        value = self.values[index]
        return value is not None and self.dims[index] == (value.dim() - 2, value.dim() - 1)

    def _above(self, value: Tensor) -> Tensor:
        later = torch.ones(self.side, self.side, dtype=torch.bool, device=value.device).triu(1)
        return value[..., later]

    def hides(self, index: int) -> bool:
        """Whether it is a mask over pairs: its numbers above the diagonal are one number that is not on the
        diagonal, or low enough to hide."""
        value = self.values[index]
        if value is None or value.dtype.is_complex or not self._square(index):
            return False
        above, diagonal = self._above(value), value.diagonal(dim1=-2, dim2=-1)
        if value.is_floating_point() and value.min() <= HIDDEN:
            return bool((above <= HIDDEN).all() and (diagonal > HIDDEN).all())
        return bool((above == above.flatten()[0]).all() and (diagonal != above.flatten()[0]).all())

    # as tables

    def rows(self, index: int, rank: int, dim: int) -> Tensor:
        """A table [L, …] of a value that runs over positions at `dim` of `rank` dims (and has no batch)."""
        return self._padded(index, rank)[0].movedim(dim - 1, 0).contiguous()

    def columns(self, index: int, rank: int) -> Tensor:
        """The value itself, with `rank` dims."""
        return self._padded(index, rank)

    def shown(self, index: int, rank: int) -> Shown:
        """The mask `index` in as few numbers as say the same, for all positions."""
        found = shown(self._padded(index, rank), self.hides(index))
        if self.side < self.length:
            from .position_samples import continued

            assert self.region is not None
            return continued(self.region, index, found, self.side, self.length)
        return found

    def dtype(self, index: int) -> torch.dtype:
        """Of a result."""
        value = self.values[index]
        assert value is not None
        return value.dtype

    def _padded(self, index: int, rank: int) -> Tensor:
        value = self.values[index]
        assert value is not None
        return value.reshape((1,) * (rank - value.dim()) + tuple(value.shape))


def _only(region: fx.GraphModule, kept: list[int]) -> fx.GraphModule:
    """The region that returns some of its results, and computes no others."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(region.graph, copied)
    values = output(region.graph).args[0]
    listed = values if isinstance(values, tuple | list) else (values,)
    graph.output(tuple(copied[listed[index]] for index in kept))  # type: ignore[index]
    graph.eliminate_dead_code()
    return fx.GraphModule(region, graph)
