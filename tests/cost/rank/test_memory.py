"""What lies in the memory of a rank is foretold: weights, gradients, averages and caches to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.cost import Cost
from moec.cost.rank.memory import Memory, largest
from moec.cost.symbols import symbol
from moec.errors import CostError
from moec.ir.mesh import Mesh
from moec.plan import Train
from moec.runtime.recompute import recomputing
from tests.cost.kept import kept_bytes
from tests.cost.whole_steps import LENGTH, VOCABULARY, compiled, settings_of, take_steps

EXPERTS = {"experts": 4, "top_k": 2, "layers": "-1:", "residual": "learned"}
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"moe": EXPERTS}),
    "data": (2, {"moe": EXPERTS, "parallel": {"expert": 2}}),
    "tensor": (2, {"moe": EXPERTS, "parallel": {"tensor": 2, "expert": 1}}),
    "slices": (4, {"moe": EXPERTS, "parallel": {"tensor": 2, "expert": 2, "slice": 2}}),
    "few experts": (4, {"moe": EXPERTS, "parallel": {"expert": 2}}),
}


def require_bytes(world: int, plan: dict[str, Any], train: Train) -> None:
    """Every rank holds what was foretold of it, and the first as much as any."""
    found = []
    for one in take_steps(compiled(plan, world), train):
        cost = one.cost(train)
        numbers = cost.memory.numbers(**one.letters)
        assert numbers["parameters"] == one.parameters
        assert numbers["gradients"] == one.gradients
        assert numbers["optimizer"] == one.optimizer
        assert cost.weights is not None
        assert cost.number(sympy.Add(*(group.stretch for group in cost.weights.groups))) == one.arrived
        found.append(one.parameters + one.gradients + one.optimizer)
    assert found[0] == max(found)


@pytest.mark.parametrize("name", PLANS)
def test_weights_gradients_and_averages_to_the_byte(name: str) -> None:
    """With 65 words, which no number of ranks divides."""
    require_bytes(*PLANS[name], settings_of())


@pytest.mark.nightly
@settings(max_examples=12)
@given(
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from(["all", "1::2"]),
)
def test_random_plans(ranks: tuple[int, int], experts: int, slices: int, layers: str) -> None:
    world, tensor = ranks
    slices = min(slices, world)
    moe = {"experts": experts, "top_k": 1, "layers": layers}
    parallel = {"tensor": tensor, "expert": min(experts, world // slices), "slice": slices}
    require_bytes(world, {"moe": moe, "parallel": parallel}, settings_of())


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_for_backward(recompute: bool) -> None:
    """The graph and the loss; where regions compute again, what they read."""
    program = compiled({"moe": EXPERTS}, 1)
    tokens, targets = torch.randint(VOCABULARY, (2, 3, LENGTH)).unbind()
    targets = targets.clone()  # in memory of its own: it is kept, the tokens are the caller's

    def run() -> object:
        with recomputing(program, recompute):
            return program.loss(tokens, targets)

    program.train()
    kept, _ = kept_bytes(run, [*program.parameters(), *program.buffers(), tokens])
    cost = program.cost(train=settings_of(recompute=recompute))
    saved = sympy.Add(*(one.saved for one in cost.operations))
    assert cost.number(saved, B=3, S=LENGTH) == kept


def test_recomputation_keeps_less() -> None:
    program = compiled({"moe": EXPERTS}, 1)
    kept = [program.cost(train=settings_of(recompute=how)).memory for how in (False, True)]
    plain, again = (memory.numbers(B=8, S=64)["activations"] for memory in kept)
    assert again < 0.8 * plain


@pytest.mark.parametrize("name", ["one", "tensor"])
def test_caches_to_the_byte(name: str) -> None:
    world, plan = PLANS[name]
    program = compiled(plan, world)
    local = program.partition(0)
    memory = local.cost("decode").memory
    held = local.decoder(8).new_cache(3, 8).num_bytes()
    assert memory.numbers(B=3, L=8, n=1, m=1)["cache"] == held > 0


def test_axes_are_letters() -> None:
    """What one text tells of four ranks is what the text lowered for four says."""
    options, letters = {"width": 16, "heads": 4}, {"B": 2, "S": 6, "tensor": 4, "world": 4, "data": 1}
    two, four = (
        compiled({"parallel": {"tensor": ranks}}, ranks, **options).cost().memory.numbers(**letters)
        for ranks in (2, 4)
    )
    exact = ("parameters", "gradients", "optimizer", "activations")
    assert {part: two[part] for part in exact} == {part: four[part] for part in exact}


def test_inference_holds_weights_and_what_is_alive() -> None:
    program = compiled({}, 1)
    memory = program.cost("forward").memory.numbers(B=2, S=6)
    assert memory["parameters"] == sum(p.nbytes for p in program.parameters())
    assert "gradients" not in memory
    assert memory["activations"] >= 2 * 6 * VOCABULARY * 4  # the logits
    assert memory["total"] == memory["parameters"] + memory["activations"]


def test_whether_it_fits() -> None:
    memory = compiled({}, 1).cost().memory
    total = memory.numbers(B=2, S=6)["total"]
    assert memory.fits(total, B=2, S=6)
    assert not memory.fits(total - 1, B=2, S=6)
    assert [row["memory"] for row in memory.table(B=2, S=6).data()] == list(memory.parts)
    with pytest.raises(CostError, match="no number for S"):
        memory.numbers(B=2)
    with pytest.raises(CostError, match="operations alone"):
        _ = Cost((), "forward", Mesh()).memory


def test_activations_and_gradients_on_their_way_are_never_there_together() -> None:
    size = sympy.Integer
    memory = Memory(parameters=size(5), activations=size(30), working=size(3), communication=size(20))
    assert memory.total == 5 + 33


@given(
    st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=8),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_the_largest(coefficients: list[tuple[int, int, int]], batch: int, length: int) -> None:
    """What is left out of the expression is never the largest."""
    b, s = symbol("B"), symbol("S")
    amounts = [x * b * s + y * b + z for x, y, z in coefficients]
    at = {b: batch, s: length}
    assert largest(amounts).subs(at) == max(sympy.sympify(amount).subs(at) for amount in amounts)
