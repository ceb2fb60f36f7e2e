"""Expressions as functions of numpy arrays, for sweeps over many sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from sympy.printing.numpy import NumPyPrinter

from moec.cost.symbols import symbol
from moec.errors import CostError

Numbers = NDArray[np.float64]


def lambdified(amount: Any, letters: Sequence[str]) -> Callable[..., Numbers]:
    """`amount` as a function of `letters`, in this order: numbers or arrays in, float64 out, broadcast.

    Computed in float64: whole numbers are exact up to 2^53. Raises `CostError` where a letter of the amount
    is not among `letters`, and where one of these is there twice.
    """
    expr = sympy.sympify(amount)
    standing = {str(letter): letter for letter in expr.free_symbols}
    given = [standing.get(name, symbol(name)) for name in letters]
    twice = next((name for place, name in enumerate(letters) if name in letters[:place]), None)
    if twice is not None:
        raise CostError("lambdify", f"letter {twice!r} twice", "each letter once")
    missing = sorted(standing.keys() - set(letters))
    if missing:
        needed = f"a number, or a place among the letters, for {', '.join(missing)}"
        raise CostError("lambdify", f"letters {', '.join(letters) or 'none'}", needed)
    # Without cse, which builds every maximum anew: that is slow, and sympy 1.14 orders some of them wrongly.
    compute = sympy.lambdify(given, expr, modules="numpy", printer=_Printer)

    def function(*numbers: Any) -> Numbers:
        # As floats: products of sizes are soon beyond what an int64 holds, and numpy would not tell.
        arrays = np.broadcast_arrays(*(np.asarray(number, dtype=np.float64) for number in numbers))
        found = np.asarray(compute(*arrays), dtype=np.float64)
        return np.broadcast_to(found, arrays[0].shape).copy() if arrays else found

    function.__doc__ = f"{expr}"
    return function


class _Printer(NumPyPrinter):  # type: ignore[misc]  # sympy has no types
    """numpy's own `amax` over a list wants arrays of one shape, and a constant has another."""

    def _print_Max(self, expr: Any) -> str:
        return self._pairwise("maximum", list(expr.args))

    def _print_Min(self, expr: Any) -> str:
        return self._pairwise("minimum", list(expr.args))

    def _pairwise(self, name: str, amounts: list[Any]) -> str:
        function = self._module_format(f"numpy.{name}")
        first, *rest = map(self._print, amounts)
        for other in rest:
            first = f"{function}({first}, {other})"
        return str(first)
