"""Numbers for expressions, as sympy computes them; what is alike is priced once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.cost import Cost, predict, symbol
from moec.runtime.ops.work import Product, Work
from tests.cost.timing.test_predict import MESH, B, S, compute, send, simple, wait

letters = [symbol(name) for name in ("B", "S", "tensor")]


@st.composite
def amounts(draw: st.DrawFn, depth: int = 3) -> sympy.Expr:
    """Expressions as costs have them."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from([*letters, sympy.Integer(3), sympy.Rational(1, 3), sympy.Float(0.25)]))
    left, right = draw(amounts(depth - 1)), draw(amounts(depth - 1))
    how = draw(st.integers(0, 6))
    return [
        left + right,
        left * right,
        left / right,
        sympy.Max(left, right),
        sympy.Min(left, right, 5),
        sympy.ceiling(left / 2),
        (1 - sympy.Rational(1, 7)) ** left,
    ][how]


@settings(max_examples=80)
@given(st.lists(amounts(), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 9))
def test_an_evaluator_computes_what_sympy_does(drawn: list[sympy.Expr], b: int, s: int) -> None:
    works = [Work((), amount, 2 * amount, 1) for amount in drawn]
    cost = Cost(tuple(replace(compute(), forward=work) for work in works), "forward", MESH)
    evaluator = cost.evaluator
    values = evaluator({"B": b, "S": s, "tensor": 2})
    arrays = evaluator({"B": np.array([1.0, b]), "S": np.array([1.0, s]), "tensor": 2})
    for index, amount in enumerate(drawn):
        place = evaluator.tasks[evaluator.forward[index]].read
        expected = float(amount.subs({B: b, S: s, letters[2]: 2}))
        assert float(values[place]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert np.broadcast_to(arrays[place], 2)[1] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_operations_that_cost_the_same_are_priced_once() -> None:
    alike = [
        replace(compute(f"layer {index}"), layer=index, forward=Work((), B * S, 0)) for index in range(50)
    ]
    evaluator = Cost(tuple(alike), "forward", MESH).evaluator
    assert len(set(evaluator.forward)) == 1
    assert evaluator.letters == {"B", "S"}


def test_sixty_layers_take_a_moment() -> None:
    """3000 operations of few kinds: what a program of 60 layers has."""
    layer = [
        replace(compute(str(i)), forward=Work((Product(B * S, 64 * i, 64),), B * S * i, B))
        for i in range(1, 49)
    ]
    layer += [send(), wait(48)]
    cost = Cost(tuple(layer * 60), "training", MESH)
    hardware = simple()
    predict(cost, hardware, B=8, S=2)
    found = predict(cost, hardware, B=8, S=4)
    assert len(found.timeline) > 5000
    assert len(cost.evaluator.tasks) < 200
