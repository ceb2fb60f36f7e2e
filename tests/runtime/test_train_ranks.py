"""Steps on any mesh are those of one process: loss, gradient norm, and the weights after three of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moec
from moec.errors import TrainError
from moec.plan import Train
from moec.program import Program
from moec.runtime.simulated import run_ranks
from moec.runtime.step import OptimizerStep
from tests.runtime.rank_runs import (
    PYRAMID,
    Steps,
    compiled,
    plan,
    random_batches,
    take_steps,
    take_steps_on_ranks,
)

STEP = Train(batch=8, sequence=8, accumulate=2, lr=1e-2, clip=0.5)

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {"expert": 1}),
    "expert 2": (2, {"expert": 2}),
    "pyramid on 4": (4, {"expert": 4}),
    "slice 2": (4, {"expert": 2, "slice": 2}),
    "tensor 3, data 2, expert 2": (6, {"tensor": 3, "expert": 2}),
}


def assert_same(found: Steps, expected: Steps, tolerance: float) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=tolerance)
    assert found.parameters.keys() == expected.parameters.keys()
    for name, value in expected.parameters.items():
        assert _difference(found.parameters[name], value) <= tolerance, name


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the scale of the weight."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def both(described: dict[str, Any], world: int, **how: Any) -> tuple[Program, Program]:
    return compiled(described, **how), compiled(described, world, **how)


@pytest.mark.parametrize("mesh", MESHES)
def test_three_steps_are_those_of_one_process(mesh: str) -> None:
    world, parallel = MESHES[mesh]
    whole, placed = both(plan(**parallel), world)
    batches = random_batches(3, STEP.batch)
    assert_same(take_steps_on_ranks(placed, STEP, batches), take_steps(whole, STEP, batches), 1e-9)


def test_three_steps_in_fp32() -> None:
    whole, placed = both(plan(expert=4), 4, dtype=torch.float32)
    batches = random_batches(3, STEP.batch)
    found, expected = take_steps_on_ranks(placed, STEP, batches), take_steps(whole, STEP, batches)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    # Relative to all weights: AdamW moves by the sign of a gradient, also of one that is rounding alone.
    pairs = [(found.parameters[name], value) for name, value in expected.parameters.items()]
    difference = math.sqrt(sum(float((left - right).square().sum()) for left, right in pairs))
    assert difference <= 1e-5 * math.sqrt(sum(float(right.square().sum()) for _, right in pairs))


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, Any], int, Train]:
    """A plan, a number of ranks it can have, and settings, among them batches that do not divide evenly."""
    expert, slices, data, tensor = draw(
        st.sampled_from([(1, 1, 2, 1), (2, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (4, 1, 1, 1), (1, 2, 1, 3)])
    )
    world = expert * slices * data * tensor
    capacity = draw(st.sampled_from((0.6, 1.0, "dropless")))
    moe = {
        **PYRAMID, "top_k": draw(st.integers(1, 2)), "capacity_factor": capacity,
        "residual": draw(st.sampled_from(("none", "sum", "learned"))),
        "gate": draw(st.sampled_from(("normalized", "probability", "straight-through"))),
    }  # fmt: skip
    accumulate = draw(st.integers(1, 2))
    step = Train(
        batch=accumulate * draw(st.integers(1, 5)), sequence=8, accumulate=accumulate, lr=1e-2,
        clip=draw(st.sampled_from((0.0, 0.1))),
    )  # fmt: skip
    return plan(moe, expert=expert, slice=slices, tensor=tensor), world, step


@settings(max_examples=3)
@given(runs())
def test_any_plan_on_any_mesh(run: tuple[dict[str, Any], int, Train]) -> None:
    described, world, step = run
    whole, placed = both(described, world)
    batches = random_batches(3, step.batch)
    expected = take_steps(whole, step, batches)
    assert_same(take_steps_on_ranks(placed, step, batches), expected, 1e-9)


@pytest.mark.nightly
@given(runs())
def test_many_plans_on_many_meshes(run: tuple[dict[str, Any], int, Train]) -> None:
    described, world, step = run
    whole, placed = both(described, world)
    batches = random_batches(3, step.batch)
    assert_same(take_steps_on_ranks(placed, step, batches), take_steps(whole, step, batches), 1e-9)


def test_a_rank_may_have_no_sequence() -> None:
    step = STEP.model_copy(update={"batch": 3, "accumulate": 1})
    whole, placed = both(plan(expert=4), 4)
    batches = random_batches(3, step.batch)
    assert_same(take_steps_on_ranks(placed, step, batches), take_steps(whole, step, batches), 1e-9)


def test_bf16_keeps_fp32_weights_and_learns_alike() -> None:
    step = STEP.model_copy(update={"dtype": "bf16"})
    whole, placed = both(plan(expert=2), 2, dtype=torch.float32)
    batches = random_batches(6, step.batch)
    found, expected = take_steps_on_ranks(placed, step, batches), take_steps(whole, step, batches)
    assert {value.dtype for value in found.parameters.values()} == {torch.float32}
    assert found.losses == pytest.approx(expected.losses, rel=5e-3)


def test_recomputation_changes_no_bit_and_keeps_less() -> None:
    settings = {again: STEP.model_copy(update={"recompute": again}) for again in (False, True)}
    placed = compiled(plan(expert=2), 2, dropout=0.2)
    batches = random_batches(2, STEP.batch)
    kept, again = (take_steps_on_ranks(placed, settings[how], batches) for how in (False, True))
    assert (kept.losses, kept.norms) == (again.losses, again.norms)
    assert all(torch.equal(value, again.parameters[name]) for name, value in kept.parameters.items())
    sizes = {how: _bytes_kept(settings[how]) for how in (False, True)}
    assert sizes[True] < 0.6 * sizes[False]


def _bytes_kept(step: Train) -> int:
    """What autograd holds on to between the forward and the backward of a batch."""
    program = compiled(plan())
    weights = {parameter.untyped_storage().data_ptr() for parameter in program.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        OptimizerStep(program.train(), step).gradients(random_batches(1, step.batch)[0])
    return sum(size for place, size in kept.items() if place not in weights)


def test_recomputation_needs_regions_and_eager_mode() -> None:
    step = STEP.model_copy(update={"recompute": True})
    program = compiled(plan())
    program.backend = "inductor"
    with pytest.raises(TrainError, match="backend = 'inductor'"):
        OptimizerStep(program, step).gradients(random_batches(1, 4)[0])
    without = moec.compile(torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)), None)
    with pytest.raises(TrainError, match="without regions"):
        OptimizerStep(without, step).gradients(random_batches(1, 4)[0])


# errors, of all ranks alike


def errors_of(placed: Program, spoil: Any) -> list[TrainError]:
    """The error of each rank in a step before which `spoil(rank, local)` was called."""
    assert placed.layout is not None

    def body(rank: int) -> TrainError:
        local = placed.partition(rank)
        step = OptimizerStep(local.train(), STEP)
        before = {name: value.clone() for name, value in local.named_parameters()}
        spoil(rank, local)
        with pytest.raises(TrainError) as caught:
            step.take(random_batches(1, STEP.batch)[0], 1e-2)
        assert all(torch.equal(value, before[name]) for name, value in local.named_parameters())
        assert all(value.grad is None for _, value in local.named_parameters())
        return caught.value

    return run_ranks(placed.layout.mesh, body)


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all() -> None:
    def spoil(rank: int, local: Program) -> None:
        if rank == 1:
            expert = dict(local.named_parameters())["moe_1.up.weight"]
            expert.register_hook(lambda gradient: gradient / 0.0)

    placed = compiled(plan(expert=4), 4)
    for error in errors_of(placed, spoil):
        assert error.where == "moe_1.up.weight"
        assert not math.isfinite(float(error.found.split()[-1]))


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(rank: int, local: Program) -> None:
        if rank == 1:
            terms_of = local.loss_terms
            monkeypatch.setitem(local.__dict__, "loss_terms", lambda *batch: _spoilt(terms_of(*batch)))

    placed = compiled(plan(expert=2), 2)
    assert {error.where for error in errors_of(placed, spoil)} == {"loss"}


def _spoilt(terms: Any) -> Any:
    return {**terms, "loss": terms["loss"] * math.nan}


def test_a_parameter_that_nothing_depends_on_is_named() -> None:
    def spoil(rank: int, local: Program) -> None:
        local.graph.get_parameter("unused").requires_grad_(True)

    placed = compiled(plan(expert=2), 2).fork()
    placed.graph.register_parameter("unused", torch.nn.Parameter(torch.ones(3).double()))
    for error in errors_of(placed, spoil):
        assert (error.where, error.found) == ("unused", "no gradient on any rank")
