"""Predictions of real programs: every phase, other numbers of ranks, what overlaps in a lowered graph."""

from __future__ import annotations

from typing import Any

import pytest

from moec.cost import Cost, Hardware, predict
from moec.cost.reading.routing import Routing
from moec.program import Program
from tests.cost.whole_steps import compiled

MOE = {"experts": 16, "top_k": 1, "layers": "-1:", "residual": "learned"}
LETTERS: dict[str, dict[str, int]] = {
    "training": {"B": 2, "S": 8},
    "forward": {"B": 2, "S": 8},
    "decode": {"B": 2, "n": 1, "m": 1, "L": 8},
}


@pytest.fixture(scope="module")
def program() -> Program:
    """Four ranks, two to a node, experts on all of them; a dense branch beside the experts."""
    parallel: dict[str, Any] = {"expert": 4, "node": 2, "all_to_all": "hierarchical"}
    return compiled({"moe": MOE, "parallel": parallel}, 4)


@pytest.fixture(scope="module")
def costs(program: Program) -> dict[str, Cost]:
    return {phase: program.cost(phase) for phase in LETTERS}  # type: ignore[arg-type]


def cluster(nodes: int = 2) -> Hardware:
    return Hardware.shipped("a100x16").model_copy(update={"per_node": 2, "nodes": nodes})


@pytest.mark.parametrize("phase", LETTERS)
def test_every_phase_takes_its_time_and_tells_its_amounts(costs: dict[str, Cost], phase: str) -> None:
    cost, letters = costs[phase], LETTERS[phase]
    found = predict(cost, cluster(), **letters)
    assert found.seconds > 0
    assert found.flops == pytest.approx(cost.number(cost.flops, **letters))
    assert found.bytes == pytest.approx(cost.number(cost.bytes, **letters))
    assert found.fits
    assert {"inside", "between"} <= found.by("stream").keys()
    ran = {step.operation.name for step in found.timeline}
    assert ran == {one.name for one in cost.operations}


@pytest.mark.parametrize("phase", LETTERS)
def test_more_rows_are_never_faster(costs: dict[str, Cost], phase: str) -> None:
    letters = LETTERS[phase]
    longer = "L" if phase == "decode" else "S"
    before = predict(costs[phase], cluster(), **letters).seconds
    for name in ("B", longer):
        more = letters | {name: 2 * letters[name]}
        assert predict(costs[phase], cluster(), **more).seconds >= before * (1 - 1e-9)


def test_rows_on_their_way_overlap_with_the_dense_branch(costs: dict[str, Cost]) -> None:
    """The graph starts an exchange, computes the branch that needs none, and waits."""
    found = predict(costs["forward"], cluster(), captured=True, B=2, S=8)
    assert found.exposed < found.communication
    both = found.by("stream")
    assert max(both.values()) < found.seconds < sum(both.values())


def test_one_lowering_is_priced_at_other_numbers_of_ranks(costs: dict[str, Cost]) -> None:
    cost = costs["forward"]
    few = predict(cost, cluster(), B=2, S=8)
    many = predict(cost, cluster(8), B=2, S=8, data=16, expert_4=16)
    assert (few.axes["expert_4_between"], many.axes["expert_4_between"]) == (2, 8)
    assert many.by("axis")["expert_4_between"] > few.by("axis")["expert_4_between"]


def test_the_rank_that_gets_most_rows_is_what_all_wait_for(program: Program, costs: dict[str, Cost]) -> None:
    letters = {"B": 64, "S": 8}
    even = predict(costs["forward"], cluster(), captured=True, **letters).seconds
    skewed = [program.cost("forward", routing=Routing.skewed(hottest=times)) for times in (2.0, 3.0)]
    twice, thrice = (predict(cost, cluster(), captured=True, **letters).seconds for cost in skewed)
    assert even < twice < thrice


def test_it_reads_well(costs: dict[str, Cost]) -> None:
    text = str(predict(costs["training"], cluster(), B=2, S=8))
    assert text.startswith("training on A100-SXM4-40GB, B = 2, S = 8")
    assert "optimizer" in text
    small = cluster().device.model_copy(update={"memory": 1000.0})
    tight = predict(costs["training"], cluster().model_copy(update={"device": small}), B=2, S=8)
    assert "does not fit" in str(tight)
    assert not tight.fits
