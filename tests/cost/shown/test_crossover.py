"""Crossovers: the claimed winner wins on both sides of every point, and formulas meet the points."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import sympy
from hypothesis import given

from moec.cost.shown.crossover import EQUAL, crossover
from moec.cost.symbols import symbol
from moec.errors import CostError

P, INSIDE, B, E = (symbol(name) for name in ("p", "inside", "B", "E"))
ALPHA, BETA, BYTES = (sympy.Symbol(name, positive=True) for name in ("alpha", "beta", "bytes"))
FLAT = (P - 1) * ALPHA + BYTES * BETA
TWO_STEPS = (INSIDE + P / INSIDE - 2) * ALPHA + 2 * BYTES * BETA
NAMES = ("flat", "hierarchical")

COUNTS = st.integers(1, 60)
TERMS: st.SearchStrategy[Any] = st.one_of(
    st.builds(lambda a, b: a * B + b, COUNTS, COUNTS),
    st.builds(lambda a, b: a * B**2 + b, COUNTS, COUNTS),
    st.builds(lambda a, b: a * sympy.ceiling(B / b), COUNTS, COUNTS),
    st.builds(lambda a, b: a * (1 - sympy.Rational(b, b + 1) ** B), COUNTS, COUNTS),
    st.builds(sympy.Integer, st.integers(1, 2000)),
)
SIDES = st.one_of(
    TERMS,
    st.builds(sympy.Add, TERMS, TERMS),
    st.builds(sympy.Max, TERMS, TERMS),
    st.builds(sympy.Min, TERMS, TERMS),
)


@given(SIDES, SIDES)
def test_the_winner_wins_at_every_number(first: Any, second: Any) -> None:
    if not (first.has(B) or second.has(B)):
        return
    found = crossover(first, second, "B", names=("first", "second"), over=(1, 64))
    for at in range(1, 65):
        left, right = (sympy.Rational(side.subs(B, at)) for side in (first, second))
        winner = found.winner(at)
        if abs(left - right) > 10 * EQUAL * max(left, right):
            assert winner == ("first" if left < right else "second"), f"B = {at}: {left} and {right}; {found}"
        else:
            assert left != right or winner == ""


@given(SIDES, SIDES)
def test_a_formula_meets_its_point(first: Any, second: Any) -> None:
    if not (first.has(B) or second.has(B)):
        return
    for point in crossover(first, second, "B", over=(1, 64)).points:
        if point.exact is not None:
            assert float(point.exact) == pytest.approx(point.at, rel=1e-5)


def test_two_steps_win_from_so_many_ranks_on() -> None:
    found = crossover(
        FLAT, TWO_STEPS, "p", names=NAMES, over=(2, 1024), inside=8, bytes=2**16, alpha=5e-6, beta=4e-11
    )
    assert str(found).startswith("flat wins when p ≤ 8; hierarchical wins when p ≥ 9  (inside = 8, ")
    (point,) = found.points
    exact = INSIDE * (ALPHA * INSIDE - ALPHA + BETA * BYTES) / (ALPHA * (INSIDE - 1))
    assert sympy.simplify(point.exact - exact) == 0
    assert found.formulas == ("p = inside·(alpha·inside - alpha + beta·bytes)/(alpha·(inside - 1))",)
    assert r"\text{hierarchical} &: \frac{" in found.latex()


def test_a_letter_that_is_no_count_is_closed_in_on() -> None:
    found = crossover(
        BYTES**2 - 10 * BYTES + sympy.Rational(43, 2), 0, "bytes", names=("below", "above"), over=(1, 50)
    )
    assert [stretch.winner for stretch in found.stretches] == ["above", "below", "above"]
    assert [point.at for point in found.points] == pytest.approx([5 - 3.5**0.5, 5 + 3.5**0.5])
    assert [str(point.exact) for point in found.points] == ["5 - sqrt(14)/2", "sqrt(14)/2 + 5"]


def test_a_branch_that_is_not_taken_is_not_told() -> None:
    # 2·B meets 60 + B at 60, where the maximum is 900; 900 meets it at 840, where the maximum is 2·B.
    found = crossover(sympy.Max(2 * B, 900), 60 + B, "B", names=("first", "second"), over=(1, 5000))
    assert [stretch.winner for stretch in found.stretches] == ["second"]
    assert not found.points


def test_equal_stretches_are_told_as_such() -> None:
    found = crossover(sympy.ceiling(B / 3), 4, "B", names=("blocks", "limit"), over=(1, 100))
    assert str(found).startswith(
        "blocks wins when B ≤ 9; both are equal when 10 ≤ B ≤ 12; limit wins when B ≥ 13"
    )


def test_no_crossover_is_said() -> None:
    assert str(crossover(B, 2 * B, "B", names=("one", "two"))) == "one wins everywhere  (B from 1 to 4,096)"


@pytest.mark.parametrize(
    ("letter", "given_", "over", "told"),
    [
        ("BE", {}, (1, 9), "nearest '[BE]'"),
        ("B", {}, (1, 9), "no number for E"),
        ("B", {"E": 2}, (9, 1), "a range of positive numbers"),
        ("B", {"E": 2}, (1, 10**8), "at most 1,000,000 numbers"),
    ],
)
def test_what_cannot_be_asked(letter: str, given_: dict[str, int], over: tuple[int, int], told: str) -> None:
    with pytest.raises(CostError, match=told):
        crossover(B * E, 10, letter, over=over, **given_)


def test_outside_of_the_range_nothing_is_claimed() -> None:
    with pytest.raises(CostError, match="1 to 4,096"):
        crossover(B, 7, "B").winner(5000)
