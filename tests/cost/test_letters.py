"""Numbers for letters: a misspelt one, a size that is none, ranks of another program are refused."""

from __future__ import annotations

from typing import Any

import pytest
import sympy

from moec.cost import Cost, Hardware, predict
from moec.cost.letters import checked, numbers_of
from moec.cost.symbols import rate, symbol
from moec.errors import CostError, MeshError, MoecError
from moec.ir.mesh import ExpertAxes, Mesh
from tests.cost.whole_steps import compiled

MESH = Mesh(2, 2, 2, (("moe_0", ExpertAxes(2, 2, 1)),))
PLACED = {"moe": {"experts": 4, "layers": "-1:"}, "parallel": {"tensor": 2, "expert": 2}}


@pytest.fixture(scope="module")
def cost() -> Cost:
    """With four heads, which are dealt out to two ranks."""
    return compiled(PLACED, 4, width=16, heads=4).cost("forward")


@pytest.mark.parametrize(
    ("letters", "told"),
    [
        ({"b": 1}, "'B'"),
        ({"tensr": 2}, "'tensor'"),
        ({"B": 0}, "B = 0"),
        ({"B": -1}, "1 or more"),
        ({"B": 1.5}, "a whole number"),
        ({"S": "8"}, "S = '8'"),
        ({"S": float("nan")}, "S = nan"),
        ({"L": None}, "L = None"),
        ({"peak": -1.0}, "a positive number"),
        ({"peak": float("inf")}, "a positive number"),
    ],
)
def test_no_letter_and_no_number_is_passed_over(letters: dict[str, Any], told: str) -> None:
    with pytest.raises(CostError, match=told):
        checked(letters, MESH.axes())


def test_axes_follow_from_those_that_are_given() -> None:
    found = numbers_of({"B": 3, "tensor": 4, "peak": 1e12}, MESH)
    assert found[symbol("tensor")] == 4
    assert found[symbol("world")] == 8
    assert found[symbol("expert_data_2")] == 4
    assert found[symbol("B")] == 3
    assert found[rate("peak")] == sympy.Float(1e12)


def test_ranks_of_another_program_are_refused() -> None:
    """An axis of one rank stands in no text; what is dealt out is dealt out evenly."""
    with pytest.raises(MeshError, match="slice_2 = 2, of a program that has one rank there"):
        numbers_of({"slice_2": 2, "expert_2": 1}, MESH)
    with pytest.raises(MeshError, match="tensor 2"):
        numbers_of({"world": 3}, MESH)
    heads = frozenset({sympy.Integer(6) / symbol("tensor")})
    assert numbers_of({"tensor": 3}, MESH, heads)[symbol("tensor")] == 3
    with pytest.raises(MeshError, match="6 can be dealt out to evenly"):
        numbers_of({"tensor": 4}, MESH, heads)


def test_wherever_numbers_go_in_they_are_checked(cost: Cost) -> None:
    hardware = Hardware.shipped("a100x8")
    ways = [
        lambda **letters: predict(cost, hardware, **letters),
        lambda **letters: cost.at("flops", **letters),
        lambda **letters: cost.number("flops", **letters),
        lambda **letters: cost.table("kind", **letters),
        lambda **letters: cost.memory.numbers(**letters),
        lambda **letters: cost.counted_traffic(**letters),
    ]
    for way in ways:
        way(B=2, S=4)
        for wrong in ({"tensr": 2}, {"tensor": 3}, {"B": -2}, {"B": 2.5}):
            with pytest.raises(MoecError):
                way(**{"B": 2, "S": 4, **wrong})
    with pytest.raises(CostError, match="tensr"):
        cost.lambdify("flops", ["B", "S", "tensr"])
    with pytest.raises(CostError, match="twice"):
        cost.lambdify("flops", ["B", "S", "B"])
    with pytest.raises(CostError, match="tensr"):
        cost.crossover(0, "B", "flops", S=4, tensr=2)
    with pytest.raises(CostError, match="no number for S"):
        cost.number("flops", B=1)


def test_heads_are_dealt_out_evenly(cost: Cost) -> None:
    """A width that four ranks divide, and heads that they divide too; eight ranks do not."""
    whole = compiled({**PLACED, "parallel": {"tensor": 4, "expert": 2}}, 4, width=16, heads=4).cost("forward")
    letters = {"B": 2, "S": 4}
    assert cost.number("flops", tensor=4, data=1, **letters) == whole.number("flops", **letters)
    with pytest.raises(MeshError, match="4 can be dealt out to evenly"):
        cost.number("flops", tensor=8, **letters)


def test_the_table_of_axes_tells_the_ranks_that_are_asked_for(cost: Cost) -> None:
    rows = {row[0]: row[1] for row in cost.table("axis", B=2, S=4, tensor=4).rows}
    assert rows["tensor"] == 4
