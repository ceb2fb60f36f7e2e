"""Tables of costs add up and say the same in every form; functions of arrays agree with expressions."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import sympy
import torch
from hypothesis import given

import moec
from examples.gpt import GPT, GPTConfig
from moec.cost import Cost, Hardware
from moec.cost.cost import AMOUNTS
from moec.cost.shown.lambdified import lambdified
from moec.cost.shown.spelling import short, spelled
from moec.cost.shown.summary import BY
from moec.cost.shown.table import Column, Table
from moec.cost.symbols import symbol
from moec.errors import CostError

B, S, TENSOR = symbol("B"), symbol("S"), symbol("tensor")
PLAN = {
    "moe": {"experts": 4, "layers": "1::2", "top_k": 2, "residual": "learned"},
    "parallel": {"data": 2, "tensor": 2, "expert": 2, "slice": 2},
}


@pytest.fixture(scope="module")
def cost() -> Cost:
    """A training step of one of four ranks."""
    torch.manual_seed(0)
    return moec.compile(
        GPT(GPTConfig(vocab=20, seq=16, layers=2, width=8, heads=2)), plan=PLAN, verify="off"
    ).cost()


@pytest.mark.parametrize("by", BY)
def test_rows_add_up_to_the_total(cost: Cost, by: str) -> None:
    for letters in ({}, {"B": 2, "S": 8}):
        table = cost.table(by, **letters)
        for place, column in enumerate(table.columns):
            if column.unit or column.name in ("kernels", "messages"):
                rows = sympy.Add(*(sympy.sympify(row[place]) for row in table.rows))
                assert sympy.expand(rows - table.total[place]) == pytest.approx(0, abs=1e-6), column


def test_every_table_has_the_same_total(cost: Cost) -> None:
    totals = {cost.table(by, B=3, S=5).total[2:] for by in BY if by != "axis"}
    assert len(totals) == 1
    ((forward, backward, moved, kernels, sent),) = totals
    assert forward + backward == cost.number(cost.flops, B=3, S=5)
    assert (moved, kernels, sent) == tuple(cost.at(name, B=3, S=5) for name in ("bytes", "calls", "sent"))


def test_what_is_sent_by_axis_is_all_that_is_sent(cost: Cost) -> None:
    table = cost.table("axis", B=3, S=5)
    assert table.total[-2:] == (cost.at("messages", B=3, S=5), cost.at("sent", B=3, S=5))
    assert {row[0] for row in table.rows} <= set(cost.mesh.axes())


def test_letters_are_explained(cost: Cost) -> None:
    text = str(cost)
    for letter in cost.table().total[3].free_symbols:
        assert re.search(rf"^{letter} +\w", text, re.MULTILINE)


def test_data_reads_back(cost: Cost) -> None:
    letters = {name: symbol(name) for name in ("B", "S", *cost.mesh.axes())}
    for row, data in zip(cost.table().rows, cost.table().data(), strict=True):
        told = sympy.sympify(data["bytes"], locals=letters)
        assert sympy.expand(told - row[4]) == 0


@pytest.mark.parametrize("name", AMOUNTS)
def test_functions_of_arrays_agree_with_expressions(cost: Cost, name: str) -> None:
    batches, lengths = np.array([1, 2, 7]), np.array([3, 8, 16])
    found = cost.lambdify(name, ["B", "S"])(batches, lengths)
    exact = [
        float(cost.number(cost.amount(name), B=int(b), S=int(s)))
        for b, s in zip(batches, lengths, strict=True)
    ]
    assert found == pytest.approx(exact, rel=1e-12)


def test_seconds_are_those_of_every_operator(cost: Cost) -> None:
    hardware = Hardware.shipped("a100x8")
    device, expected = hardware.device, 0.0
    for one in cost.operations:
        for work in (one.forward, one.backward):
            flops, moved, calls = (float(cost.at(x, B=2, S=8)) for x in (work.flops, work.bytes, work.calls))
            computed = flops / (device.peak[one.dtype] * device.product_share) if flops else 0.0
            if calls:
                expected += (
                    max(computed, moved / (device.bandwidth * device.memory_share)) + calls * device.launch
                )
        for sent in (*one.sends, *one.sends_back):
            messages, moved = (float(cost.at(x, B=2, S=8)) for x in (sent.messages, sent.bytes))
            expected += messages * hardware.inside.latency + moved / hardware.inside.bandwidth
    seconds = cost.lambdify(cost.seconds_expression(hardware), ["B", "S"])(2, 8)
    assert float(seconds) == pytest.approx(expected, rel=1e-9)


def test_seconds_without_hardware_have_its_letters(cost: Cost) -> None:
    letters = {str(letter) for letter in cost.seconds_expression().free_symbols}
    assert {"peak", "bandwidth", "launch", "latency", "link", "B", "S"} <= letters


def test_typos_are_told_with_the_nearest(cost: Cost) -> None:
    with pytest.raises(CostError, match="nearest 'layer'"):
        cost.table("layers")
    with pytest.raises(CostError, match="nearest 'bytes'"):
        cost.lambdify("byte", ["B"])
    with pytest.raises(CostError, match="letter 'batch'"):
        cost.table(batch=3)
    with pytest.raises(CostError, match="for S"):
        cost.lambdify("flops", ["B"])


def test_forms_of_a_table() -> None:
    table = Table(
        (Column("kind"), Column("FLOPs", "FLOP"), Column("bytes", "B")),
        (("a_b", 2 * B * S, 12_345_678), ("c|d", 0, 3 * B)),
        title="T",
        total=("all", 2 * B * S, 3 * B),
        notes=("note",),
    )
    assert str(table).splitlines() == [
        "T",
        "",
        "kind  FLOPs     bytes",
        "a_b   2·B·S  12.35 MB",
        "c|d       –       3·B",
        "all   2·B·S       3·B",
        "note",
    ]
    assert table.markdown().splitlines()[2:4] == ["| a_b | 2·B·S | 12.35 MB |", r"| c\|d | – | 3·B |"]
    assert r"a\_b & $2\,B\,S$ & 12.35 MB \\" in table.latex()
    assert table.data() == [
        {"kind": "a_b", "FLOPs": "2*B*S", "bytes": 12_345_678},
        {"kind": "c|d", "FLOPs": 0, "bytes": "3*B"},
    ]


@pytest.mark.parametrize(
    ("amount", "written"),
    [
        (64 * B * S * (2 * TENSOR - 2) / TENSOR, "128·B·S - 128·B·S/tensor"),
        (4 * (1 - sympy.Rational(3, 4) ** (B * S)), "4 - 4·(3/4)^(B·S)"),
        (B * S**2 * 12_345_678, "12.35M·B·S²"),
        (sympy.ceiling(B / TENSOR) / (S + 1), "⌈B/tensor⌉/(S + 1)"),
        (-sympy.Max(B, 3 * S) / 3, "-max(3·S, B)/3"),
        (9999, "9,999"),
        (10_000, "10 k"),
    ],
)
def test_amounts_are_written_so(amount: Any, written: str) -> None:
    assert spelled(amount) == written


@given(st.floats(1e-12, 1e24))
def test_four_figures_are_right(number: float) -> None:
    text, _, unit = short(number, "B").rpartition(" ")
    scale = dict(
        zip(("p", "n", "µ", "m", "", "k", "M", "G", "T", "P", "E", "Z", "Y"), range(-4, 9), strict=True)
    )
    assert float(text.replace(",", "")) * 1000.0 ** scale[unit[:-1]] == pytest.approx(number, rel=6e-4)


@given(st.integers(1, 40), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_arrays_meet_maxima_of_any_shape(limit: int, batches: list[int]) -> None:
    amount = sympy.Max(limit, B, 3 * S) + sympy.ceiling(B / S) - sympy.Min(B, limit)
    exact = [float(amount.subs({B: b, S: 5})) for b in batches]
    assert lambdified(amount, ["B", "S"])(np.array(batches), 5) == pytest.approx(exact)
