"""The numbers that a caller puts in for letters: names that costs have, sizes and ranks that there can be.

A misspelt letter would leave an axis as it is and tell a number all the same; so would a size that is none,
and ranks on which the program would be lowered otherwise: that one has a cost of its own.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import sympy

from moec.cost.symbols import MEANINGS, RATES, is_letter, meaning, rate, symbol
from moec.cost.timing.arranged import arranged
from moec.errors import CostError, MeshError, nearest
from moec.ir.mesh import Mesh

_FOLLOW = ("world", "expert_alike_")  # these say nothing of the text that `data`, `tensor` and so on do not


def numbers_of(
    letters: Mapping[str, Any],
    mesh: Mesh,
    dealt: Iterable[sympy.Expr] = (),
    others: Iterable[str] = (),
) -> dict[sympy.Symbol, sympy.Expr]:
    """The numbers of `letters`, and of all axes of `mesh`: as they are there, or as they follow from others.

    `dealt`: what is dealt out evenly to ranks (`24/tensor`); `others`: further letters that there may be.
    Raises `CostError` for a letter that is none or a number that it cannot have, `MeshError` for ranks that
    do not fit together or on which the program would be lowered otherwise.
    """
    own = mesh.axes()
    given = checked(letters, own, others)
    ranks = arranged(mesh, given).numbers
    _require_lowered(own, ranks)
    _require_even(dealt, ranks)
    numbers = {**given, **ranks}
    return {_letter(name): sympy.sympify(number) for name, number in numbers.items()}


def checked(
    letters: Mapping[str, Any], axes: Iterable[str] = (), others: Iterable[str] = ()
) -> dict[str, Any]:
    """`letters`, once every name is one of a cost with these `axes`, or one of `others`.

    Sizes and ranks are whole numbers from 1 on, rates and others positive ones. Raises `CostError`.
    """
    counts = dict.fromkeys([*MEANINGS, *axes])
    require_known(letters, [*counts, *others])
    return {name: _number(name, number, name in counts) for name, number in letters.items()}


def require_known(names: Iterable[str], letters: Iterable[str]) -> None:
    """Raise `CostError` for a name that is none of `letters` and no rate."""
    known = list(dict.fromkeys(letters))
    for name in names:
        if name not in known and name not in RATES:
            raise CostError("cost", f"a letter {name!r}", f"one of {', '.join(known)}", nearest(name, known))


def missing(letter: str) -> CostError:
    """The error of a letter that has no number, with its meaning."""
    described = meaning(letter) if is_letter(letter) else f"known are {', '.join(MEANINGS)} and axes"
    return CostError("cost", f"no number for {letter}", f"{letter} = … ({described})")


def _letter(name: str) -> sympy.Symbol:
    return rate(name) if name in RATES else symbol(name)


def _number(name: str, number: Any, counts: bool) -> Any:
    """The number, if the letter of this name can have it; `counts`: a whole one."""
    size: float = 0
    with contextlib.suppress(TypeError, ValueError):
        size = operator.index(number) if counts else float(number)
    if not 0 < size < math.inf:
        needed = "a whole number, 1 or more" if counts else "a positive number"
        raise CostError("cost", f"{name} = {number!r}", needed)
    return size


def _require_lowered(own: Mapping[str, int], asked: Mapping[str, int]) -> None:
    """An axis of one rank is left out of the text: what more ranks of it send does not stand there."""
    for axis, ranks in asked.items():
        follows = axis.startswith(_FOLLOW) or axis.endswith(("inside", "between"))
        if own[axis] == 1 < ranks and not follows:
            found = f"{axis} = {ranks}, of a program that has one rank there"
            raise MeshError("cost", found, f"the cost of a program that was placed with {axis} = 2 or more")


def _require_even(dealt: Iterable[sympy.Expr], ranks: Mapping[str, int]) -> None:
    numbers = {symbol(axis): sympy.Integer(count) for axis, count in ranks.items()}
    for part in sorted(dealt, key=lambda one: (one.as_numer_denom()[0], str(one))):
        if part.xreplace(numbers).is_Integer:
            continue
        whole, by = part.as_numer_denom()
        found = ", ".join(f"{axis} = {numbers[axis]}" for axis in sorted(by.free_symbols, key=str))
        raise MeshError("cost", found, f"numbers of ranks that {whole} can be dealt out to evenly")
