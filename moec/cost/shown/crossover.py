"""Where one thing becomes cheaper than another: `flat wins when expert < 23.4, hierarchical when …`.

crossover(flat, hierarchical, "p", names=("flat", "hierarchical"), over=(2, 1024), inside=8, bytes=65536)

Winners are found by computing both sides over the whole range: a letter that counts things at every number of
it, any other on a fine grid whose changes are closed in on. So a solution of a formula that holds elsewhere,
or a branch of a maximum that is not taken, is never told. A point where the winner changes is also solved
for, with all other letters left as letters, and the solution is kept only where it meets the point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy

from moec.cost.letters import checked
from moec.cost.shown.lambdified import lambdified
from moec.cost.shown.spelling import formula, latex, short
from moec.cost.symbols import is_letter
from moec.errors import CostError, nearest

EVERY = 1_000_000  # so many whole numbers are all tried
GRID = 20_001  # points of a range that is not
EQUAL = 1e-12  # sides that differ by less of their size are equal: float64 has no more to say
MET = 1e-6  # how near a solution comes to the point that it is said to be
DEGREE = 4  # of a polynomial that is solved in closed form


@dataclass(frozen=True)
class Stretch:
    """From `low` to `high`, both included, `winner` costs less; empty where both cost the same."""

    low: float
    high: float
    winner: str


@dataclass(frozen=True)
class Point:
    """Where the winner changes: a number, and as which expression in the other letters, if one is known."""

    at: float
    exact: sympy.Expr | None = None


@dataclass(frozen=True)
class Crossover:
    """Which of two costs less for every value of `letter` in a range, with the numbers `given` for others.

    `points[i]` lies between `stretches[i]` and `stretches[i + 1]`. `whole`: the letter counts something, and
    every number in the range was tried.
    """

    letter: str
    names: tuple[str, str]
    stretches: tuple[Stretch, ...]
    points: tuple[Point, ...]
    whole: bool = True
    given: Mapping[str, float] = field(default_factory=dict)
    said: str = "wins"

    def winner(self, at: float) -> str:
        """Who costs less there; empty where both cost the same. Raises `CostError` outside of the range."""
        for stretch in self.stretches:
            if stretch.low <= at <= stretch.high:
                return stretch.winner
        low, high = self.stretches[0].low, self.stretches[-1].high
        if low <= at <= high:
            raise CostError("Crossover", f"{self.letter} = {at}", f"a value that was tried: {self}")
        raise CostError("Crossover", f"{self.letter} = {at}", f"{short(low)} to {short(high)}")

    def __str__(self) -> str:
        tried = f"{self.letter} from {short(self.stretches[0].low)} to {short(self.stretches[-1].high)}"
        given = ", ".join(f"{name} = {short(number)}" for name, number in self.given.items())
        where = f"({given}; {tried})" if given else f"({tried})"
        return "; ".join(map(self._told, range(len(self.stretches)))) + f"  {where}"

    def _told(self, place: int) -> str:
        winner = self.stretches[place].winner
        said = f"{winner} {self.said}" if winner else "both are equal"
        return f"{said} {self._when(place)}"

    def _when(self, place: int) -> str:
        """The condition of one stretch: `when p > 23.4`, of whole numbers `when p ≥ 24`."""
        stretch, last = self.stretches[place], len(self.stretches) - 1
        less, more = ("≤", "≥") if self.whole else ("<", ">")
        low, high = self._written(stretch.low), self._written(stretch.high)
        if last == 0:
            return "everywhere"
        if stretch.low == stretch.high:
            return f"when {self.letter} = {low}"
        if place == 0:
            return f"when {self.letter} {less} {high}"
        return (
            f"when {self.letter} {more} {low}"
            if place == last
            else f"when {low} {less} {self.letter} {less} {high}"
        )

    def _written(self, at: float) -> str:
        """An end of a stretch: four figures, but whole numbers in full."""
        return f"{int(at):,}" if self.whole else short(at)

    @property
    def formulas(self) -> tuple[str, ...]:
        """The points as expressions in the other letters, where one was found: `p = 2·inside + …`."""
        return tuple(
            f"{self.letter} = {formula(point.exact)}" for point in self.points if point.exact is not None
        )

    def latex(self) -> str:
        """The conditions as LaTeX, a line for each stretch; points in full where they were solved for."""
        lines = []
        for place, stretch in enumerate(self.stretches):
            low = _latex(self.points[place - 1]) + " < " if place else ""
            high = " < " + _latex(self.points[place]) if place < len(self.points) else ""
            winner = stretch.winner or "equal"
            lines.append(rf"\text{{{winner}}} &: {low}{latex(sympy.Symbol(self.letter))}{high}")
        return "\\begin{aligned}\n" + " \\\\\n".join(lines) + "\n\\end{aligned}"


def crossover(
    first: Any,
    second: Any,
    letter: str,
    *,
    names: tuple[str, str] = ("the first", "the second"),
    over: tuple[float, float] = (1, 4096),
    said: str = "wins",
    **given: float,
) -> Crossover:
    """Where `first` is less than `second`, two expressions or numbers, for `letter` in the range `over`.

    `names` and `said`: in which words the outcome is told of the one that is less.
    `given`: numbers for all other letters. A letter that counts something (`symbol`) takes whole numbers.
    Raises `CostError` for a letter that stands in neither, one without a number, one that is none, or an
    empty range.
    """
    sides = sympy.sympify(first), sympy.sympify(second)
    letters = {str(one): one for side in sides for one in side.free_symbols}
    _require(letter, letters, given, over)
    numbers = {letters[name]: sympy.sympify(number) for name, number in given.items() if name in letters}
    compute = [lambdified(side.xreplace(numbers), [letter]) for side in sides]

    def difference(at: Any) -> Any:
        """-1, 0 or 1: who costs less."""
        left, right = (function(at) for function in compute)
        alike = np.abs(left - right) <= EQUAL * np.maximum(np.abs(left), np.abs(right))
        return np.where(alike, 0, np.sign(left - right))

    runs = _runs(difference, over, bool(letters[letter].is_integer))
    winners = {-1: names[0], 0: "", 1: names[1]}
    changes = [_closed_in(difference, a[1], b[0])[1] for a, b in itertools.pairwise(runs)]
    return Crossover(
        letter,
        names,
        tuple(Stretch(low, high, winners[sign]) for low, high, sign in runs),
        tuple(_point(sides[0] - sides[1], letters[letter], numbers, change) for change in changes),
        bool(letters[letter].is_integer),
        {str(name): float(number) for name, number in numbers.items()},
        said,
    )


def _require(
    letter: str, letters: Mapping[str, Any], given: Mapping[str, float], over: tuple[float, float]
) -> None:
    if letter not in letters:
        needed = f"a letter of the two: {', '.join(sorted(letters)) or 'they have none'}"
        raise CostError("crossover", f"letter {letter!r}", needed, nearest(letter, letters))
    checked(given, filter(is_letter, given), letters)
    missing = sorted(letters.keys() - given.keys() - {letter})
    if missing:
        raise CostError("crossover", f"no number for {', '.join(missing)}", f"{missing[0]}=…")
    tried = f"{letter} from {over[0]} to {over[1]}"
    if not 0 < over[0] < over[1] < math.inf:
        raise CostError("crossover", tried, "a range of positive numbers")
    if letters[letter].is_integer and math.ceil(over[0]) >= math.floor(over[1]):
        raise CostError("crossover", tried, "two whole numbers or more")
    if letters[letter].is_integer and over[1] - over[0] > EVERY:
        raise CostError("crossover", tried, f"at most {EVERY:,} numbers to try")


Run = tuple[float, float, int]
Difference = Callable[[Any], Any]


def _runs(difference: Difference, over: tuple[float, float], whole: bool) -> list[Run]:
    """(low, high, sign) of every stretch of equal sign, whose ends are neighbours."""
    low, high = over
    tried = np.arange(math.ceil(low), math.floor(high) + 1.0) if whole else np.geomspace(low, high, GRID)
    signs = difference(tried)
    changes = np.flatnonzero(np.diff(signs))
    ends = [float(tried[0])]
    for place in changes:
        here, there = float(tried[place]), float(tried[place + 1])
        ends += (here, there) if whole else _closed_in(difference, here, there)
    ends.append(float(tried[-1]))
    kinds = [int(signs[0]), *(int(signs[place + 1]) for place in changes)]
    return list(zip(ends[::2], ends[1::2], kinds, strict=True))


def _closed_in(difference: Difference, low: float, high: float) -> tuple[float, float]:
    """The neighbours among floats between which the sign at `low` ends."""
    first = int(difference(low))
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if int(difference(middle)) == first else (low, middle)
    return low, high


def _point(
    difference: sympy.Expr, letter: sympy.Symbol, numbers: Mapping[sympy.Symbol, Any], at: float
) -> Point:
    """The point with the expression that it is, if a polynomial says it."""
    taken = _taken(difference, {**numbers, letter: sympy.Float(at)})
    above = sympy.together(taken).as_numer_denom()[0]
    if not above.is_polynomial(letter) or not 0 < sympy.degree(above, letter) <= DEGREE:
        return Point(at)
    for solution in sympy.roots(sympy.Poly(above, letter)):
        reached = sympy.N(solution.xreplace(dict(numbers)))
        if reached.is_real and abs(float(reached) - at) <= MET * abs(at):
            return Point(at, sympy.simplify(solution))
    return Point(at)


def _taken(amount: sympy.Expr, at: Mapping[sympy.Symbol, Any]) -> sympy.Expr:
    """`amount` with every maximum and minimum replaced by the argument that it is at this place."""
    if not amount.has(sympy.Max, sympy.Min):
        return amount
    arguments = [_taken(one, at) for one in amount.args]
    if isinstance(amount, sympy.Max | sympy.Min):
        pick = max if isinstance(amount, sympy.Max) else min
        return pick(arguments, key=lambda one: float(one.xreplace(dict(at))))
    return amount.func(*arguments)


def _latex(point: Point) -> str:
    return latex(point.exact, expand=False) if point.exact is not None else f"{point.at:.6g}"
