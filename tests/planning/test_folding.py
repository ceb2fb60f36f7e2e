"""The cost of a folded program, written out, is the cost of the program lowered in full."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import pytest
import torch

import moec
from examples.gpt import GPT, GPTConfig
from moec.api import place
from moec.cost import Cost, Hardware, predict
from moec.foresight import Phase
from moec.plan import Parallel
from moec.planning.arrangements import arrangements
from moec.planning.folding import fold, representatives, stands_for
from moec.planning.lowering import Lowering
from moec.planning.space import space_of
from moec.program import Program

EXACT = 1e-9
CLUSTER = Hardware.shipped("a100x16")
SIZES: dict[Phase, dict[str, int]] = {
    "training": {"B": 3, "S": 20},
    "forward": {"B": 3, "S": 20},
    "decode": {"B": 3, "n": 1, "m": 1, "L": 40},
}
PLANS: dict[str, dict[str, Any]] = {
    "every other": {"moe": {"layers": "1::2", "experts": 8}},
    "all": {"moe": {"layers": "all", "experts": 4, "top_k": 2, "capacity_factor": 1.0, "z_loss": 0.1}},
    "pyramid": {
        "moe": {
            "layers": "1::2",
            "experts": 4,
            "residual": "learned",
            "z_loss": 0.1,
            "override": [{"layers": "-2:", "experts": 8}],
        },
    },
    "dense": {},
}


def program_of(plan: dict[str, Any], layers: int = 8) -> Program:
    with torch.device("meta"):
        dense = GPT(GPTConfig(vocab=211, seq=64, layers=layers, width=32, heads=4, dropout=0.0))
    return moec.compile(dense, plan, world=1, verify="off")


def in_full(program: Program, parallel: Parallel, world: int, phase: Phase) -> Cost:
    plan = program.plan.model_copy(update={"parallel": parallel})
    program = program.fork()  # type: ignore[assignment]
    program.plan = plan
    return (place(program, world) if world > 1 else program).cost(phase)


def require_same(found: Cost, axes: dict[str, int], whole: Cost, sizes: dict[str, int]) -> None:
    numbers = {**sizes, **axes}
    assert [one.operator for one in found.operations] == [one.operator for one in whole.operations]
    assert [one.layer for one in found.operations] == [one.layer for one in whole.operations]
    told, needed = predict(found, CLUSTER, **numbers), predict(whole, CLUSTER, **sizes)
    assert told.seconds == pytest.approx(needed.seconds, rel=EXACT)
    assert (told.flops, told.bytes) == pytest.approx((needed.flops, needed.bytes), rel=EXACT)
    for here, there in zip(told.timeline, needed.timeline, strict=True):
        assert here.end == pytest.approx(there.end, rel=EXACT), there.operation.name


EVERY_DAY = {("all", "training"), ("dense", "forward"), ("pyramid", "training"), ("pyramid", "decode")}
CASES = [
    pytest.param(name, phase, marks=[] if (name, phase) in EVERY_DAY else [pytest.mark.nightly])
    for name in PLANS
    for phase in SIZES
]


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_folded_cost_is_the_whole_cost(name: str, phase: Phase) -> None:
    program, sizes = program_of(PLANS[name]), SIZES[phase]
    folding, world = fold(program), 8
    space = space_of(folding, world, Parallel(node=4), {})
    lowering = Lowering(folding, space, phase)
    for parallel in spread_over(arrangements(space), 3):
        arranged = lowering.cost(parallel)
        whole = in_full(program, parallel, world, phase)
        require_same(arranged.cost, arranged.axes, whole, sizes)
        assert arranged.memory(sizes) == whole.memory.numbers(**sizes)


def test_one_lowering_tells_all_arrangements_of_its_shape() -> None:
    program, sizes = program_of(PLANS["pyramid"]), SIZES["decode"]
    space = space_of(fold(program), 16, Parallel(node=4), {})
    lowering = Lowering(fold(program), space, "decode")
    by_shape: dict[Hashable, list[Parallel]] = defaultdict(list)
    for parallel in arrangements(space):
        by_shape[lowering.shape(parallel)].append(parallel)
    alike = max(by_shape.values(), key=len)
    assert len(alike) >= 3
    for parallel in (alike[-1], alike[0], alike[len(alike) // 2]):
        arranged = lowering.cost(parallel)
        whole = in_full(program, parallel, 16, "decode")
        require_same(arranged.cost, arranged.axes, whole, sizes)
        assert arranged.memory(sizes) == whole.memory.numbers(**sizes)
    assert len(lowering.shapes) == 1


def spread_over(found: list[Parallel], count: int) -> list[Parallel]:
    """A few of them, from all over the list."""
    return [found[i * (len(found) - 1) // max(count - 1, 1)] for i in range(count)]


def test_deep_programs_are_lowered_as_shallow_ones() -> None:
    assert fold(program_of(PLANS["every other"])).stands_for == (0, 1, 2, 3, 2, 3, 2, 3)
    assert len(fold(program_of(PLANS["dense"])).program.graph.get_submodule("attention_1").meta) > 0
    assert fold(program_of(PLANS["dense"])).stands_for == (0, *[1] * 7)
    assert fold(program_of(PLANS["pyramid"])).stands_for == (0, 1, 2, 3, 2, 4, 2, 4)


def test_what_cannot_be_folded_stands_for_itself() -> None:
    program = program_of(PLANS["every other"], layers=2)
    folding = fold(program)
    assert not folding.folded
    assert folding.program is program
    assert "no layer is like another" in folding.remark


def test_first_blocks_stand_for_themselves_alone() -> None:
    kinds, experts = [0, 1, 0, 1, 0, 1], [False, True] * 3
    keep = representatives(kinds, experts)
    assert keep == (0, 1, 2, 3)
    assert stands_for(kinds, experts, keep) == (0, 1, 2, 3, 2, 3)
    assert representatives([0, 0, 0], [True] * 3) == (0, 1)
