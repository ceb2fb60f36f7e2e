"""What a rank sends in a whole step is foretold to the byte, given the tables of the routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.cost.rank.counted_traffic import compared
from moec.cost.reading.routing import Routing
from moec.errors import CostError
from moec.plan import Train
from moec.runtime.ops.sent import Kind, Traffic
from tests.cost.whole_steps import Taken, compiled, counted, settings_of, take_step, take_steps
from tests.runtime.ranks import run_processes

DROPLESS = {"experts": 4, "top_k": 2, "layers": "-1:"}
CAPACITY = {"experts": 4, "top_k": 1, "capacity_factor": 1.0, "layers": "-1:"}
PLANS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "dense, tensor": (2, {"parallel": {"tensor": 2}}, {}),
    "dense, data, in two parts": (2, {"parallel": {"tensor": 1}}, {"accumulate": 2, "batch": 4, "clip": 0.0}),
    "again": (2, {"moe": DROPLESS, "parallel": {"expert": 2}}, {"recompute": True}),
    "fused": (
        2, {"moe": DROPLESS, "parallel": {"expert": 2}, "compile": {"backend": "fused"}}, {"recompute": True},
    ),
    "hierarchical": (
        4, {"moe": CAPACITY, "parallel": {"expert": 4, "node": 2, "all_to_all": "hierarchical"}}, {},
    ),
    "coordinated": (
        4, {"moe": DROPLESS, "parallel": {"tensor": 2, "expert": 2, "all_to_all": "coordinated"}}, {},
    ),
    "slices": (4, {"moe": DROPLESS, "parallel": {"tensor": 2, "expert": 2, "slice": 2}}, {"recompute": True}),
}  # fmt: skip


def foretold(one: Taken, train: Train, routing: Routing) -> Traffic:
    return one.cost(train, routing).counted_traffic(**one.letters)


def require_foretold(world: int, plan: dict[str, Any], train: Train) -> list[Taken]:
    """Every rank sent what was foretold, and something."""
    ranks = take_steps(compiled(plan, world), train)
    routing = counted(ranks)
    for one in ranks:
        assert one.traffic.total.bytes > 0
        assert not compared(one.traffic, foretold(one, train, routing))
    return ranks


@pytest.mark.parametrize("name", PLANS)
def test_a_whole_step_to_the_byte(name: str) -> None:
    """Forward, backward, loss, sums of gradients, norm; seven sequences are dealt out unevenly."""
    world, plan, changes = PLANS[name]
    ranks = require_foretold(world, plan, settings_of(**changes))
    if "moe" in plan:  # a wrong table is seen
        wrong = Routing.counted([[t.roll(1) for t in one.traffic.routed] for one in ranks])
        one = ranks[0]
        assert compared(one.traffic, foretold(one, settings_of(**changes), wrong))


GLOO = {
    "moe": {**CAPACITY, "layers": "all"},
    "parallel": {"tensor": 2, "expert": 2, "all_to_all": "coordinated"},
}


def step_of(rank: int) -> list[Any]:
    """What a process sends in a step, and the tables of its routing."""
    one = take_step(compiled(GLOO, 2, layers=1).partition(rank), settings_of())
    return [one.traffic.to_json(), one.traffic.routed, list(one.size)]


def test_processes_send_what_is_foretold() -> None:
    program = compiled(GLOO, 2, layers=1)
    assert program.layout is not None
    told = run_processes(program.layout.mesh, step_of)
    routing = Routing.counted([routed for _, routed, _ in told])
    for rank, (rows, _, (batch, length)) in enumerate(told):
        cost = program.cost("training", routing, train=settings_of(), rank=rank)
        assert not compared(Traffic.of_json(rows), cost.counted_traffic(B=batch, S=length))


@pytest.mark.nightly
@settings(max_examples=12)
@given(
    st.sampled_from([(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from(["flat", "hierarchical", "coordinated"]),
    st.sampled_from([{}, {"capacity_factor": 1.0}, {"capacity_factor": 0.5, "min_capacity": 1}]),
    st.booleans(),
)
def test_random_plans(
    ranks: tuple[int, int],
    experts: int,
    slices: int,
    kind: str,
    capacity: dict[str, Any],
    recompute: bool,
) -> None:
    world, tensor = ranks
    expert = min(experts, world // slices)
    if kind == "coordinated" and tensor == 1:
        kind = "flat"
    plan = {
        "moe": {"experts": experts, "top_k": 2, "layers": "all", **capacity},
        "parallel": {"tensor": tensor, "expert": expert, "slice": slices, "node": 2, "all_to_all": kind},
    }
    require_foretold(world, plan, settings_of(recompute=recompute))


def test_expressions_are_the_numbers() -> None:
    """`traffic` with numbers put in is what is counted, where nothing is rounded."""
    world, plan, _ = PLANS["dense, tensor"]
    cost = compiled(plan, world).cost()
    numbers = cost.counted_traffic(B=4, S=6)
    assert cost.traffic.keys() == numbers.sent.keys()
    for kind, sent in cost.traffic.items():
        assert cost.number(sent.bytes, B=4, S=6) == numbers.sent[kind].bytes
        assert cost.number(sent.messages, B=4, S=6) == numbers.sent[kind].messages


def test_axes_are_letters() -> None:
    """What one text tells of four ranks is what the text lowered for four says."""
    on_two, on_four = (compiled({"parallel": {"tensor": 1}}, world).cost() for world in (2, 4))
    letters = {"B": 3, "S": 6, "world": 4, "data": 4}
    assert on_two.counted_traffic(**letters).sent == on_four.counted_traffic(**letters).sent


def test_rows_are_dealt_out_evenly_in_the_mean() -> None:
    """A quarter of the rows stays here."""
    plan = {"moe": DROPLESS, "parallel": {"expert": 4}}
    cost = compiled(plan, 4).cost("forward")
    sent = cost.traffic[Kind("forward", "expert_4", "moec.exchange")]
    assert cost.number(sent.bytes, B=2, S=6) == 2 * (3 / 4) * (2 * 6 * 2) * 12 * 4


def test_tables_that_do_not_fit_are_refused() -> None:
    program = compiled({"moe": DROPLESS, "parallel": {"expert": 2}}, 2)
    rows = torch.tensor([3, 3, 3, 3])
    for tables, what in (
        ([[rows]], "tables of 1 ranks"),
        ([[rows, rows]] * 2, "more expert layers"),
        ([[]] * 2, "no table"),
        ([[rows[:2]]] * 2, r"a table \[2\]"),
    ):
        with pytest.raises(CostError, match=what):
            program.cost("forward", Routing.counted(tables))
