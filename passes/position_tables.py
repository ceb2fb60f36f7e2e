"""What the positions of a program look like: its position-only values, evaluated.

The region is run, not read: whatever the spelling, a learned embedding, a rotary table, a bias or a mask is the
numbers it gives. Those of a longer sequence must begin with those of a shorter one, or else no table is the same
for all lengths, and the program is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moec.errors import PassError

NOTHING = -1e4  # a score below this leaves nothing of a position after the softmax
REFUSAL = "derive_cache: positions"


@dataclass(frozen=True)
class Shown:
    """A mask [1, …, L, L] as few numbers. `kind`: `plain` (all earlier positions alike), `key` (by the position
    seen, `numbers` […, L]), `distance` (by how far back it is, [L, …]), `full` ([L, …, L], by both).
    `hidden`: the number (or False) of later positions."""

    kind: str
    numbers: Tensor | None
    hidden: float | bool


class PositionTables:
    """Results of the positions region for a sequence of `length`, and for shorter ones to compare with."""

    def __init__(self, region: fx.GraphModule | None, dims: list[tuple[int, ...]], length: int) -> None:
        self.length, self.dims = length, dims
        tensors = [] if region is None else [*region.parameters(), *region.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.values = self._evaluated(region, length) if region is not None else []
        shorter = sorted({n for n in (2, length // 2, length - 1) if 2 <= n < length})
        for n in shorter if region is not None else ():
            self._compare(self._evaluated(region, n), n)  # type: ignore[arg-type]

    def _evaluated(self, region: fx.GraphModule, length: int) -> list[Tensor | None]:
        try:
            with torch.no_grad():
                found = region(torch.zeros(1, length, dtype=torch.long, device=self.device))
        except (IndexError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise PassError(
                REFUSAL, f"no values for {length} positions: {first}", "fewer positions"
            ) from None
        values = list(found) if isinstance(found, tuple | list) else [found]
        return [value if isinstance(value, Tensor) else None for value in values]

    def _compare(self, shorter: list[Tensor | None], n: int) -> None:
        for index, (value, known) in enumerate(zip(shorter, self.values, strict=True)):
            if value is None or known is None:
                continue
            for dim in self.dims[index]:
                if known.shape[dim] != self.length:
                    found = f"result {index} has {known.shape[dim]} positions of {self.length}"
                    raise PassError(REFUSAL, found, "fewer positions")
                known = known.narrow(dim, 0, n)
            if not self._same(value, known, index):
                raise PassError(
                    REFUSAL, f"result {index} differs between {n} and {self.length} positions",
                    "values that do not depend on the length of the sequence", "program(tokens) recomputes",
                )  # fmt: skip

    def _same(self, value: Tensor, known: Tensor, index: int) -> bool:
        if torch.equal(value, known):
            return True
        # Softmax does not see a constant added to all scores: a bias counted from the end is the same bias.
        if len(self.dims[index]) != 2 or not value.is_floating_point() or not self.hides(index):
            return False
        moved = (value - known).masked_fill(known <= NOTHING, 0.0)
        first = moved[..., :1, :1].masked_fill(known <= NOTHING, 0.0)
        return torch.allclose(
            moved, first, rtol=0.0, atol=1e-6 * float(known[known > NOTHING].abs().max() + 1)
        )

    def hiding(self) -> frozenset[int]:
        """The results that are masks over pairs of positions which hide every later position."""
        return frozenset(i for i in range(len(self.values)) if self.hides(i))

    def hides(self, index: int) -> bool:
        """Whether all numbers above the diagonal are one number, that no number on the diagonal is."""
        value, dims = self.values[index], self.dims[index]
        if value is None or dims != (value.dim() - 2, value.dim() - 1):
            return False
        later = torch.ones(self.length, self.length, dtype=torch.bool, device=value.device).triu(1)
        above, diagonal = value[..., later], value.diagonal(dim1=-2, dim2=-1)
        if above.numel() == 0:
            return True
        if value.is_floating_point() and value.min() <= NOTHING:
            return bool((above <= NOTHING).all() and (diagonal > NOTHING).all())
        return bool((above == above.flatten()[0]).all() and (diagonal != above.flatten()[0]).all())

    def masks_scores(self, index: int) -> bool:
        """Whether adding it to scores (or choosing by it, where it is boolean) hides every later position."""
        value = self.values[index]
        if value is None or not self.hides(index) or self.length < 2:
            return value is not None
        above = value[..., 0, 1]
        return bool((~above).all() if value.dtype == torch.bool else (above <= NOTHING).all())

    def rows(self, index: int, rank: int, dim: int) -> Tensor:
        """A table [L, …] of a value that runs over positions at `dim` of `rank` dims (and has no batch)."""
        return self._padded(index, rank)[0].movedim(dim - 1, 0).contiguous()

    def columns(self, index: int, rank: int) -> Tensor:
        """The value itself, with `rank` dims."""
        return self._padded(index, rank)

    def shown(self, index: int, rank: int) -> Shown:
        """The mask `index` in as few numbers as say the same."""
        value = self._padded(index, rank)
        hidden = value[..., 0, -1].flatten()[0].item()
        if not self.hides(index):
            return Shown("full", value[0].movedim(-2, 0).contiguous(), hidden)
        seen = torch.ones(self.length, self.length, dtype=torch.bool, device=value.device).tril()
        last = value[..., -1, :]
        if self._as_seen(value, last[..., None, :].expand_as(value), seen):
            uniform = bool((last == last.flatten()[0]).all())
            nothing = value.dtype == torch.bool or last.flatten()[0] == 0
            return Shown(
                "plain" if uniform and nothing else "key", None if uniform and nothing else last, hidden
            )
        back = last.flip(-1)
        steps = torch.arange(self.length, device=value.device)
        by_distance = back[..., (steps[:, None] - steps).clamp(min=0)]
        if self._as_seen(value, by_distance, seen):
            return Shown("distance", back[0].movedim(-1, 0).contiguous(), hidden)
        return Shown("full", value[0].movedim(-2, 0).contiguous(), hidden)

    def _as_seen(self, value: Tensor, other: Tensor, seen: Tensor) -> bool:
        return torch.equal(value[..., seen], other[..., seen])

    def _padded(self, index: int, rank: int) -> Tensor:
        value = self.values[index]
        assert value is not None
        value = value.reshape((1,) * (rank - value.dim()) + tuple(value.shape))
        if value.shape[0] != 1:
            found = f"result {index}, of {value.shape[0]} in the place of the batch"
            raise PassError(REFUSAL, found, "values that are the same for every row of a batch")
        return value
