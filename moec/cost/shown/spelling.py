"""How amounts are written: for people with a unit and four figures, in full, and as LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
from sympy.printing.latex import LatexPrinter
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
SMALL = ("", "m", "µ", "n", "p")
EXACT = 10_000  # numbers below it are written in full
_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def short(number: float, unit: str = "") -> str:
    """Four figures and a prefix: `12.35 M`, `3.2 GB`, `47 µs`; whole numbers below 10,000 as they are."""
    space = " " if unit else ""
    if not math.isfinite(number):
        return f"{number}{space}{unit}"
    if float(number).is_integer() and abs(number) < EXACT:
        return f"{int(number):,}{space}{unit}"
    if not unit and abs(number) < EXACT:
        return f"{number:.4g}"
    step = math.floor(math.log10(abs(number)) / 3 + 1e-12)
    if round(abs(number) / 1000**step, 1) >= 1000:
        step += 1
    step = min(max(step, 1 - len(SMALL)), len(PREFIXES) - 1)
    prefix = PREFIXES[step] if step >= 0 else SMALL[-step]
    return f"{number / 1000**step:.4g} {prefix}{unit}".rstrip()


def spelled(amount: Any, unit: str = "") -> str:
    """An amount on one line: a number with its unit, an expression by its letters, coefficients shortened."""
    if isinstance(amount, str):
        return amount
    found = sympy.sympify(amount)
    return short(float(found), unit) if found.is_number else _Readable().doprint(expanded(found))


def formula(amount: Any) -> str:
    """An expression on one line, as it is factored."""
    return str(_Readable().doprint(sympy.sympify(amount)))


def in_full(amount: Any) -> str:
    """An amount as Python writes it: nothing is rounded, and `sympy.sympify` reads it back."""
    return str(sympy.sympify(amount))


def latex(amount: Any, *, expand: bool = True) -> str:
    """An amount as LaTeX: names of axes upright, exact coefficients; without `expand`, factored as it is."""
    found = sympy.sympify(amount)
    return str(_Latex({"mul_symbol": r"\,"}).doprint(expanded(found) if expand else found))


def expanded(amount: Any) -> sympy.Expr:
    """A sum of products, alike ones taken together: equal polynomials are written alike."""
    return sympy.expand(amount, power_base=False, power_exp=False, log=False)


class _Readable(StrPrinter):  # type: ignore[misc]  # sympy has no types
    """`1,344·B·S² + 12.35M·B·S/tensor`, with ⌈…⌉ for what is rounded up."""

    def _print_Integer(self, expr: Any) -> str:
        return short(int(expr)).replace(" ", "")

    def _print_Float(self, expr: Any) -> str:
        return short(float(expr)).replace(" ", "")

    def _print_Rational(self, expr: Any) -> str:
        return f"{self._print_Integer(expr.p)}/{self._print_Integer(expr.q)}"

    def _print_Mul(self, expr: Any) -> str:
        number, rest = expr.as_coeff_Mul()
        sign, number = ("-", -number) if number < 0 else ("", number)
        over, under = [number.p] if number.is_Rational else [number], [getattr(number, "q", 1)]
        for one in rest.as_ordered_factors():
            below = one.is_Pow and one.exp.is_number and one.exp.is_negative
            (under if below else over).append(1 / one if below else one)
        above, below = self._product(over), self._product(under)
        if below == "1":
            return sign + above
        return f"{sign}{above}/" + (f"({below})" if sum(one != 1 for one in under) > 1 else below)

    def _product(self, factors: Sequence[Any]) -> str:
        found = map(sympy.sympify, factors)
        kept = [one for one in found if not (one.is_number and float(one) == 1)]
        return "·".join(self.parenthesize(one, PRECEDENCE["Mul"]) for one in kept) or "1"

    def _print_Pow(self, expr: Any, rational: bool = False) -> str:
        base, power = expr.args
        below = self.parenthesize(base, PRECEDENCE["Pow"])
        if power.is_Integer and power > 0:
            return f"{below}{str(power).translate(_RAISED)}"
        if power.is_number and power.is_negative:
            return f"1/{self.parenthesize(1 / expr, PRECEDENCE['Mul'])}"
        return f"{below}^{self.parenthesize(power, PRECEDENCE['Pow'])}"

    def _print_ceiling(self, expr: Any) -> str:
        return f"⌈{self._print(expr.args[0])}⌉"

    def _print_floor(self, expr: Any) -> str:
        return f"⌊{self._print(expr.args[0])}⌋"

    def _print_Max(self, expr: Any) -> str:
        return f"max({', '.join(sorted(map(self._print, expr.args)))})"

    def _print_Min(self, expr: Any) -> str:
        return f"min({', '.join(sorted(map(self._print, expr.args)))})"


class _Latex(LatexPrinter):  # type: ignore[misc]
    """Letters of more than one character upright, so that they do not read as products."""

    def _print_Symbol(self, expr: Any, style: str = "plain") -> str:
        name = str(expr.name)
        return name if len(name) == 1 else r"\mathrm{" + name.replace("_", r"\_") + "}"
