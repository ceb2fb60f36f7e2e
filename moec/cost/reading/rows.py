"""Tables of how many rows there are for each expert: as they are in the mean, or as they were counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import sympy
from torch import Tensor

from moec.cost.reading.routing import Expected, fullest
from moec.runtime.ops.work import Amount, Load


@dataclass(frozen=True)
class Table:
    """What is known in the mean of counts of rows by expert.

    `drawn`: the rows that one rank has drawn, those without a place left out, times the ranks whose rows are
    here together; each of `tokens` tokens chose `top_k` of `experts` experts. The experts are dealt out to
    `spread` ranks, of which this is the fullest. `capacity`: the largest share of the rows that an expert
    takes, None where there is no limit.
    """

    drawn: sympy.Expr
    tokens: sympy.Expr
    top_k: int
    experts: int
    routing: Expected
    capacity: float | None = None
    spread: sympy.Expr = sympy.S.One

    @property
    def rows(self) -> sympy.Expr:
        """All rows here."""
        return self.drawn * self._excess

    @cached_property
    def _excess(self) -> Amount:
        """The rows of the fullest rank as a multiple of what a rank draws."""
        shares = self._shares
        if shares is None:
            limit = self.capacity and self.capacity * self.experts
            excess = self.routing.excess(self.spread)
            return sympy.Min(excess, sympy.Max(1, limit)) if limit else excess
        kept = [min(share, self.capacity or 1.0) for share in shares]
        return self._by_spread(
            {ranks: ranks * sum(fullest(kept, ranks)) / sum(kept) for ranks in self._possible}
        )

    @cached_property
    def _shares(self) -> tuple[float, ...] | None:
        return self.routing.shares(self.experts, self.top_k)

    @property
    def _possible(self) -> list[int]:
        """The numbers of ranks that the experts can be dealt out to."""
        return [ranks for ranks in range(1, self.experts + 1) if self.experts % ranks == 0]

    def _by_spread(self, cases: dict[int, Amount]) -> Amount:
        if self.spread.is_Integer:
            return cases[int(self.spread)]
        return sympy.Piecewise(*((amount, sympy.Eq(self.spread, ranks)) for ranks, amount in cases.items()))

    def of_ranks(self, ranks: sympy.Expr) -> Table:
        """The table of as many ranks, all with as many rows as this one."""
        return replace(self, drawn=self.drawn * ranks, tokens=self.tokens * ranks)

    def arrived(self, ranks: sympy.Expr) -> Table:
        """What the fullest of `ranks` ranks gets when each deals its rows out to all."""
        return replace(self, tokens=self.tokens * ranks, spread=self.spread * ranks)

    @property
    def load(self) -> Load:
        """The rows, and how many of the experts here get any."""
        shares = self._shares
        if shares is not None:
            cases = {ranks: _touched(fullest(shares, ranks), self) for ranks in self._possible}
            return Load(self.rows, self._by_spread(cases))
        chance = sympy.Rational(self.top_k, self.experts) * self.routing.excess(self.spread)
        missed = 1 - (chance if chance.is_Rational and chance <= 1 else sympy.Min(1, chance))
        return Load(self.rows, self.experts / self.spread * (1 - missed**self.tokens))


def _touched(shares: tuple[float, ...], table: Table) -> Amount:
    """How many experts of these shares get rows."""
    alike = Counter(min(1.0, share * table.top_k) for share in shares)
    return sympy.Add(*(number * (1 - (1 - chance) ** table.tokens) for chance, number in alike.items()))


@dataclass(frozen=True, eq=False)
class CountedTable:
    """Counts as they were, on every rank; this is the one at `rank`."""

    numbers: tuple[Tensor, ...]
    rank: int

    @property
    def here(self) -> list[int]:
        """The numbers on this rank, one after the other."""
        made: list[int] = self.numbers[self.rank].flatten().tolist()
        return made

    @property
    def rows(self) -> sympy.Integer:
        """All rows here."""
        return sympy.Integer(sum(self.here))

    @property
    def load(self) -> Load:
        """The rows, and how many of the experts here get any."""
        return Load(self.rows, sympy.Integer(sum(count > 0 for count in self.here)))


Rows = Table | CountedTable
