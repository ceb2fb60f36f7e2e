"""What is true of every cost: it adds up, names do not matter, more tokens never cost less."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import sympy

import moec
from moec.cost import Cost, Operation, meaning
from moec.cost.operation import KINDS
from moec.cost.reading.read import read_operations
from moec.ir import region_of
from moec.program import Program
from moec.runtime.ops.work import Work
from moec.testing.parts.attention import AttentionRecipe
from moec.testing.parts.feed_forward import FeedForwardRecipe
from moec.testing.recipe import DecoderRecipe

MODEL = DecoderRecipe(
    vocab=32,
    d_model=16,
    num_layers=3,
    attention=AttentionRecipe(num_heads=4, num_kv_heads=2, head_dim=4),
    ffn=FeedForwardRecipe(hidden=24, activation="silu", gating="separate"),
    tied="module",
)
MOE = {"experts": 4, "layers": "1::2", "top_k": 2, "capacity_factor": "dropless"}
PLANS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"moe": MOE},
    "ranks": {
        "moe": MOE | {"residual": "learned"},
        "parallel": {"data": 4, "tensor": 2, "expert": 2, "slice": 2, "node": 4, "all_to_all": "coordinated"},
    },
    "capacity": {"moe": MOE | {"capacity_factor": 0.5, "top_k": 1}, "parallel": {"data": 2, "expert": 2}},
}


@pytest.fixture(scope="module", params=PLANS)
def program(request: pytest.FixtureRequest) -> Program:
    plan = {**PLANS[request.param], "compile": {"verify": "off"}}
    return moec.compile(MODEL.build(device="meta"), plan=plan)


@pytest.fixture(scope="module")
def cost(program: Program) -> Cost:
    return program.cost()


def works(operations: Sequence[Operation]) -> list[Work]:
    return [work for one in operations for work in (one.forward, one.backward)]


def every_amount(cost: Cost) -> list[sympy.Expr]:
    amounts = [amount for work in works(cost.operations) for amount in (work.flops, work.read, work.written)]
    for one in cost.operations:
        amounts += [one.saved, one.weights]
        amounts += [
            amount for sent in (*one.sends, *one.sends_back) for amount in (sent.messages, sent.bytes)
        ]
    return [sympy.sympify(amount) for amount in amounts]


def test_letters_have_meanings(cost: Cost) -> None:
    letters = {str(letter) for amount in every_amount(cost) for letter in amount.free_symbols}
    assert "B" in letters
    assert all(meaning(letter) for letter in letters)


def test_no_amount_is_negative_or_falls_with_batch_or_sequence(cost: Cost) -> None:
    amounts = dict.fromkeys(every_amount(cost))
    sizes = [(1, 2), (2, 2), (2, 3), (4, 8), (8, 8), (8, 30)]
    for amount in amounts:
        values = [cost.number(amount, B=batch, S=length) for batch, length in sizes]
        assert values[0] >= 0
        assert all(more >= less * (1 - 1e-9) for less, more in itertools.pairwise(values)), amount


def test_the_whole_is_the_sum_of_regions_and_kinds(cost: Cost) -> None:
    """Nothing is counted twice or left out, however the operations are put together."""
    for sorted_by in ("region", "kind", "layer", "operator"):
        groups: dict[Any, list[Operation]] = {}
        for one in cost.operations:
            groups.setdefault(getattr(one, sorted_by), []).append(one)
        flops = sum(work.flops for group in groups.values() for work in works(group))
        assert sympy.expand(flops - cost.flops) == 0
    assert {one.kind for one in cost.operations} <= set(KINDS)


def test_a_region_costs_what_its_operators_cost(program: Program, cost: Cost) -> None:
    """Regions are those of the graph; every operator in one has its name and its layer."""
    graph = (program.partition(0) if program.layout else program).graph
    for name, module in graph.named_children():
        region = region_of(module)
        inside = [one for one in cost.operations if one.region == name]
        if region is not None and region.kind in ("attention", "ffn", "moe"):
            assert inside
            assert all(one.name.startswith(f"{name}.") and one.layer == region.index for one in inside)


def test_every_operation_reads_what_was_before(cost: Cost) -> None:
    assert all(before < index for index, one in enumerate(cost.operations) for before in one.after)


def test_stages_that_change_no_product_cost_the_same() -> None:
    """Canonical spellings, structure and names: the same products, and the same bytes kept."""
    program = moec.compile(MODEL.build(), plan={"compile": {"verify": "off"}})
    names = ["outline_positions", "name_values", "structured"]
    read = {name: Cost(read_operations(program.stages[name]), "training") for name in ("canonical", *names)}
    first = read["canonical"]
    for found in read.values():
        assert sympy.expand(found.forward_flops - first.forward_flops) == 0
        assert sympy.expand(found.backward_flops - first.backward_flops) == 0
    renamed = [
        [(one.operator, one.forward, one.backward, one.saved) for one in read[name].operations]
        for name in names
    ]
    assert renamed[0] == renamed[1] == renamed[2]


def test_the_dense_part_of_a_sparse_program_costs_what_it_did() -> None:
    """Attention and the feed-forwards that stay are the same operations, product for product."""
    dense = moec.compile(MODEL.build(device="meta"), plan={"compile": {"verify": "off"}}).cost()
    sparse = moec.compile(MODEL.build(device="meta"), plan={"moe": MOE, "compile": {"verify": "off"}}).cost()
    kept = {
        one.name: (one.forward, one.backward)
        for one in sparse.operations
        if one.kind in ("product", "attention")
    }
    before = {one.name: (one.forward, one.backward) for one in dense.operations}
    shared = kept.keys() & before.keys()
    assert all(kept[name] == before[name] for name in shared)
    assert {name.partition(".")[0] for name in shared} >= {
        "attention_0",
        "attention_1",
        "attention_2",
        "ffn_0",
        "ffn_2",
    }
