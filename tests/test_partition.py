"""The ranks of a placed program together compute what the program computes in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moec
from examples.gpt import GPT, GPTConfig
from moec.plan import Plan
from moec.runtime.simulated import run_ranks
from moec.testing import decoders_and_plans
from tests.whole_and_parts import assert_parts_are_the_whole

PR_MOE = {
    "layers": "1::2", "experts": 4, "residual": "learned", "balance_loss": 0.01,
    "override": [{"layers": "-1:", "experts": 8}],
}  # fmt: skip
MESHES: list[tuple[int, dict[str, Any]]] = [
    (2, {"expert": 2}),
    (2, {"slice": 2}),
    (2, {"tensor": 2}),
    (4, {"expert": 4}),
    (4, {"expert": 2}),
    (4, {"expert": 2, "slice": 2}),
    (4, {"expert": 4, "tensor": 2}),
    (4, {"expert": 4, "tensor": 2, "all_to_all": "flat"}),
    (4, {"expert": 4, "tensor": 4, "slice": 1}),
    (8, {"expert": 8, "node": 2}),
    (8, {"expert": 8, "tensor": 2, "node": 4}),
    (16, {"expert": 8, "slice": 2, "node": 8, "tensor": 4}),
]


def small_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab=31, seq=16, layers=4, width=24, heads=4, dropout=0.0))


def batch(batch: int, length: int, vocabulary: int = 31) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    both = torch.randint(vocabulary, (2, batch, length), generator=generator)
    return both[0], both[1]


KINDS: list[dict[str, Any]] = [
    {"top_k": 1, "init": "fresh"},
    {"top_k": 2, "gate": "probability", "z_loss": 0.001, "init": "noise"},
    {"top_k": 2, "capacity_factor": 0.7, "min_capacity": 0, "init": "fresh"},
]


@pytest.mark.parametrize("number", range(len(MESHES)))
def test_every_mesh(number: int) -> None:
    """Each mesh with one kind of layer; the nightly test below has every pair."""
    check_mesh(*MESHES[number], KINDS[number % len(KINDS)])


@pytest.mark.nightly
@pytest.mark.parametrize("moe", KINDS, ids=["top1", "top2", "capacity"])
@pytest.mark.parametrize(("world", "parallel"), MESHES, ids=str)
def test_every_mesh_with_every_kind(world: int, parallel: dict[str, Any], moe: dict[str, Any]) -> None:
    check_mesh(world, parallel, moe)


def check_mesh(world: int, parallel: dict[str, Any], moe: dict[str, Any]) -> None:
    """Compile, place, run all ranks, compare."""
    plan = {"moe": {**PR_MOE, **moe}, "parallel": parallel, "compile": {"dtype": "fp64"}}
    program = moec.compile(small_gpt(), plan, world=world, verify="off")
    assert program.stage == "placed"
    assert_parts_are_the_whole(program, *batch(9, 5))


def test_sixty_four_ranks() -> None:
    moe = {**PR_MOE, "experts": 32, "init": "fresh", "override": [{"layers": "-1:", "experts": 64}]}
    parallel = {"expert": 64, "node": 8}
    plan = {"moe": moe, "parallel": parallel, "compile": {"dtype": "fp64"}}
    program = moec.compile(small_gpt(), plan, world=64, verify="off")
    assert program.layout is not None
    axes = [(a.data, a.expert, a.slice) for _, a in program.layout.mesh.layers]
    assert axes == [(2, 32, 1), (1, 64, 1)]  # each layer of the pyramid fills the world
    assert_parts_are_the_whole(program, *batch(40, 3))


def test_all_tokens_on_one_expert() -> None:
    plan = {
        "moe": {**PR_MOE, "router_std": 0.0, "init": "fresh"},
        "parallel": {"expert": 4},
        "compile": {"dtype": "fp64"},
    }
    program = moec.compile(small_gpt(), plan, world=4, verify="off")
    counts = program.loss_terms(*batch(8, 5))["counts"]
    assert counts["moe_1"].tolist() == [40, 0, 0, 0]  # equal scores: the first expert takes all
    assert_parts_are_the_whole(program, *batch(8, 5))


@pytest.mark.parametrize("sequences", [1, 3])
def test_ranks_without_tokens(sequences: int) -> None:
    plan = {"moe": {**PR_MOE, "init": "fresh"}, "parallel": {"expert": 4}, "compile": {"dtype": "fp64"}}
    program = moec.compile(small_gpt(), plan, world=4, verify="off")
    assert_parts_are_the_whole(program, *batch(sequences, 1))


def test_ranks_with_sequences_of_other_lengths() -> None:
    """Each rank has its own batch and length: the task loss is the mean over all their tokens."""
    moe = {"layers": "1::2", "experts": 3, "top_k": 2, "init": "fresh"}
    plan = {"moe": moe, "parallel": {"expert": 3}, "compile": {"dtype": "fp64"}}
    program = moec.compile(small_gpt(), plan, world=3, verify="off")
    batches = [batch(*size) for size in ((2, 7), (1, 1), (4, 3))]

    def task(rank: int) -> torch.Tensor:
        return program.partition(rank).loss_terms(*batches[rank])["task"].detach()

    assert program.layout is not None
    found = torch.stack(run_ranks(program.layout.mesh, task)).sum()
    sums = [program.loss_terms(*one)["task"].detach() * one[0].numel() for one in batches]
    needed = torch.stack(sums).sum() / sum(one[0].numel() for one in batches)
    torch.testing.assert_close(found, needed, rtol=1e-12, atol=0)


def test_fp32() -> None:
    plan = {"moe": {**PR_MOE, "top_k": 2, "init": "fresh"}, "parallel": {"expert": 4, "tensor": 2}}
    program = moec.compile(small_gpt(), plan, world=4, verify="off")
    assert_parts_are_the_whole(program, *batch(8, 5), tolerance=1e-5)


@st.composite
def meshes(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    """A number of ranks and a `[parallel]` table that fits it."""
    world = draw(st.sampled_from((2, 4, 3, 6, 8)))
    divisors = [d for d in range(1, world + 1) if world % d == 0]
    return world, {
        "tensor": draw(st.sampled_from(divisors)),
        "expert": draw(st.integers(1, world)),
        "slice": draw(st.sampled_from(divisors)),
        "node": draw(st.sampled_from((1, 2, 4, 8))),
        "all_to_all": draw(st.sampled_from(("auto", "flat", "hierarchical", "coordinated"))),
    }


@settings(max_examples=30)
@given(
    decoders_and_plans(float32=False, dropout=False, max_experts=8, max_layers=3, interfaces=("logits",)),
    meshes(),
    st.sampled_from((5, 1, 8)),
)
def test_any_decoder_any_plan_any_mesh(pair: Any, mesh: tuple[int, dict[str, Any]], sequences: int) -> None:
    """Random decoders × plans × meshes; a mesh that does not fit the model is refused with a `PlanError`."""
    recipe, plan = pair
    world, parallel = mesh
    tables = {"parallel": parallel, "compile": {"dtype": "fp64"}}
    plan = Plan.resolve({**without_draws(plan), **tables})
    program = compiled_or_refused(recipe.build(seed=0, dtype=torch.float64), plan, world)
    if program is not None:
        tokens = recipe.tokens(batch=sequences, length=4)
        targets = recipe.tokens(seed=1, batch=sequences, length=4)
        assert_parts_are_the_whole(program, tokens, targets)


def compiled_or_refused(model: nn.Module, plan: Plan, world: int) -> moec.Program | None:
    """The placed program; None when the mesh does not fit the model, which must be said of `[parallel]`."""
    try:
        return moec.compile(model, plan, world=world, verify="off")
    except moec.PlanError as error:
        refused = error
    assert "[parallel]" in refused.where
    return None


def without_draws(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, with nothing that draws numbers while training: ranks draw others than one
    process."""
    found = plan.model_dump(exclude_none=True)
    for table in [found["moe"], *found["moe"]["override"]] if plan.moe is not None else []:
        table |= {"noise": "none", "random_token_selection": False}
    return found
