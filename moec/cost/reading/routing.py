"""How tokens are dealt out to experts, as far as it is known: what the number of rows on a rank follows from.

    Routing.balanced()                    every expert is as likely as any other
    Routing.skewed(hottest=1.5)           the fullest rank gets half as many rows again as the mean
    Routing.skewed(zipf=0.5)              the e-th expert gets a share that falls as e ** -0.5
    Routing.skewed([0.4, 0.3, 0.2, 0.1])  the shares of the experts, of every layer with as many
    Routing.counted(tables)               the tables of a run: per rank, as `Traffic.routed` has them

Tokens are taken to choose independently of each other, expert e with probability p_e = K · (its share of
the rows), so one of T tokens at least chooses it with probability 1 - (1 - p_e) ** T. That is exact for any
way in which one token chooses K different experts; in a real text neighbours choose alike, and fewer are
touched.

The rank that is told of is the fullest one, which the others wait for. With capacity, an expert takes its
mean up to the capacity; that the number fluctuates, and some is dropped though the mean fits, is left out: of
a mean of M rows about 0.4 · sqrt(M) where capacity is just M.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from torch import Tensor

from moec.errors import CostError
from moec.runtime.ops.work import Amount


class Routing:
    """See the module. Ranks that an axis deals the experts out to hold consecutive ones."""

    @staticmethod
    def balanced() -> Balanced:
        """Every expert is as likely as any other."""
        return Balanced()

    @staticmethod
    def skewed(
        shares: Sequence[float] | None = None, *, zipf: float | None = None, hottest: float | None = None
    ) -> Routing:
        """Some experts are likelier; give one of the three. Raises `CostError` for what is no routing.

        `shares`: by expert, of any sum; no expert can be chosen twice by a token, so none may get more than
        1/K of the rows. `zipf`: the exponent of shares that fall with the number of the expert, cut off at
        1/K. `hottest`: how much the fullest rank gets, as a multiple of the mean over the ranks.
        """
        given = [name for name, value in (("shares", shares), ("zipf", zipf), ("hottest", hottest))
                 if value is not None]  # fmt: skip
        if len(given) != 1:
            raise CostError("Routing.skewed", " and ".join(given) or "nothing", "shares, zipf or hottest")
        if hottest is not None:
            return Hottest(_least("hottest", hottest, 1.0))
        if zipf is not None:
            return Zipf(_least("zipf", zipf, 0.0))
        return Shares(_shares(tuple(shares or ())))

    @staticmethod
    def counted(tables: Sequence[Sequence[Tensor]]) -> Counted:
        """What a run counted: for each rank, the rows i64 [E] that it sent to each expert, layer by layer."""
        return Counted(tuple(map(tuple, tables)))


class Expected(Routing, ABC):
    """A routing that is known in the mean."""

    @abstractmethod
    def shares(self, experts: int, top_k: int) -> tuple[float, ...] | None:
        """Of the rows, by expert; None: all the same."""

    def excess(self, spread: Amount) -> Amount:
        """How many times the mean the fullest of `spread` ranks gets, where no shares say it."""
        return sympy.Integer(1)


@dataclass(frozen=True)
class Balanced(Expected):
    """See `Routing.balanced`."""

    def shares(self, experts: int, top_k: int) -> None:
        return None


@dataclass(frozen=True)
class Hottest(Expected):
    """See `Routing.skewed`: `factor` times the mean, or all rows where that is less."""

    factor: float

    def shares(self, experts: int, top_k: int) -> None:
        return None

    def excess(self, spread: Amount) -> Amount:
        return sympy.Min(sympy.nsimplify(self.factor, rational=True), spread)


@dataclass(frozen=True)
class Zipf(Expected):
    """See `Routing.skewed`."""

    exponent: float

    def shares(self, experts: int, top_k: int) -> tuple[float, ...]:
        # A high power is 0 in float64, and what is cut off of the first experts still goes to the others.
        least = sys.float_info.min
        return cut_off([max((e + 1) ** -self.exponent, least) for e in range(experts)], 1 / top_k)


@dataclass(frozen=True)
class Shares(Expected):
    """See `Routing.skewed`; the shares add up to 1."""

    given: tuple[float, ...]

    def shares(self, experts: int, top_k: int) -> tuple[float, ...]:
        if len(self.given) != experts:
            found = f"shares of {len(self.given)} experts"
            raise CostError("routing", found, f"shares of {experts}, as a layer has")
        if max(self.given) * top_k > 1 + 1e-9:
            found = f"a share of {max(self.given):.3g} where a token chooses {top_k} experts"
            raise CostError("routing", found, f"at most 1/{top_k}: no token chooses an expert twice")
        return self.given


@dataclass(frozen=True, eq=False)
class Counted(Routing):
    """See `Routing.counted`."""

    tables: tuple[tuple[Tensor, ...], ...]


BALANCED = Balanced()


def cut_off(weights: Sequence[float], limit: float) -> tuple[float, ...]:
    """Shares in proportion to `weights`, none above `limit`: what is cut off goes to the others.

    Needs limit · len(weights) ≥ 1.
    """
    full: set[int] = set()
    while True:
        rest = sum(w for e, w in enumerate(weights) if e not in full)
        left = 1 - limit * len(full)
        found = [limit if e in full else w * left / rest for e, w in enumerate(weights)]
        more = {e for e, share in enumerate(found) if share > limit * (1 + 1e-12)}
        if not more:
            return tuple(found)
        full |= more


def fullest(shares: Sequence[float], ranks: int) -> tuple[float, ...]:
    """The shares of the experts on the fullest of `ranks` ranks."""
    each = len(shares) // ranks
    return max((tuple(shares[first : first + each]) for first in range(0, len(shares), each)), key=sum)


def _shares(given: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 <= share < math.inf for share in given) or sum(given) <= 0:
        raise CostError("Routing.skewed", f"shares {list(given)}", "shares of the experts, none below 0")
    return tuple(share / sum(given) for share in given)


def _least(name: str, value: float, least: float) -> float:
    if not least <= value < math.inf:
        raise CostError("Routing.skewed", f"{name} = {value}", f"a number, at least {least}")
    return value
