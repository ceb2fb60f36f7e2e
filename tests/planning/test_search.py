"""The search finds what trying everything in full finds, keeps to the memory, and says why others lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moec
from examples.gpt import GPT, GPTConfig
from moec.api import place
from moec.cost import Hardware, predict
from moec.errors import MeshError, MoecError, PlanError
from moec.plan import Plan
from moec.planning.job import Job
from moec.planning.search import Search
from moec.program import Program

CLUSTER = Hardware.shipped("a100x4")
MOE = {"moe": {"layers": "1::2", "experts": 4}}
BATCH, PAST = 16, 24


def dense() -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig(vocab=64, seq=32, layers=2, width=32, heads=2, dropout=0.0))


def program_of(plan: dict[str, Any]) -> Program:
    program = moec.compile(dense(), {key: plan[key] for key in plan if key != "parallel"}, verify="off")
    program.plan = Plan.resolve(plan)
    return program


@pytest.fixture(scope="module")
def searched() -> Search:
    """One search whose programs are lowered once for all tests here; each sets the limit it needs."""
    program = program_of(MOE)
    job = Job.of(program, "latency", CLUSTER.world, batch=BATCH, past=PAST)
    return Search(program, job, CLUSTER, CLUSTER.device.memory)


def test_trying_everything_in_full_finds_the_same_winner(searched: Search) -> None:
    searched.limit = CLUSTER.device.memory
    outcomes = searched.outcomes()
    assert len(outcomes) > 10
    best = min(outcomes, key=lambda one: one.score)
    for one in (best, *outcomes[::4]):
        program = program_of(MOE)
        program.plan = one.plan
        cost, letters = place(program, 4).cost("decode"), searched.job.letters(one.batch)
        assert predict(cost, CLUSTER, **letters).seconds == pytest.approx(one.seconds, rel=1e-9)
        assert cost.memory.numbers(**letters) == one.memory
        assert one.seconds >= best.seconds


def test_more_memory_is_never_slower(searched: Search) -> None:
    searched.limit = CLUSTER.device.memory
    sizes = sorted({one.memory["total"] for one in searched.outcomes()})
    found = []
    for limit in (sizes[0] - 1, sizes[0], sizes[len(sizes) // 2], sizes[-1]):
        searched.limit = limit
        fitting = [one for one in searched.outcomes() if one.fits]
        assert all(one.memory["total"] <= limit for one in fitting)
        found.append(min((one.score for one in fitting), default=float("inf")))
    assert found == sorted(found, reverse=True)
    assert found[0] == float("inf")


def test_losers_say_where_their_time_goes(searched: Search) -> None:
    searched.limit = CLUSTER.device.memory
    best, *others = sorted(searched.outcomes(), key=lambda one: one.score)
    assert best.why_not(best) == ""
    for one in (best, *others):
        assert sum(one.times.values()) == pytest.approx(one.seconds, rel=1e-6)
    assert all("more of" in one.why_not(best) or one.why_not(best) == "as fast" for one in others)
    slowest = others[-1].why_not(best)
    assert slowest.startswith(f"{others[-1].score / best.score:.3g}× slower: ")


def test_what_does_not_fit_says_by_how_much(searched: Search) -> None:
    searched.limit = 100
    one = searched.outcomes()[0]
    assert not one.fits
    assert one.why_not(None).startswith("does not fit by ")
    assert "experts alone" in one.why_not(None)
    assert one.memory["total"] > 100


def test_the_plan_found_is_a_plan() -> None:
    fixed = {"tensor": 2, "expert": 4, "slice": 1, "all_to_all": "flat"}
    found = moec.search(dense(), CLUSTER, plan={**MOE, "parallel": fixed}, batch=BATCH, past=PAST)
    assert [one.parallel.tensor for one in found.ranked] == [2]
    plan = Plan.from_text(found.best.plan.to_toml())
    assert plan.parallel.model_dump() == found.best.parallel.model_dump()
    assert moec.compile(dense(), plan, verify="off").layout.mesh == found.best.mesh
    (proof,) = found.proofs
    assert proof.seconds == pytest.approx(found.best.seconds, rel=1e-9)
    assert proof.memory == found.best.memory["total"]
    assert "the best" in str(found)
    assert "compiled in full" in str(found)


def test_throughput_fills_the_memory_and_training_counts_parts() -> None:
    program = program_of(
        {**MOE, "parallel": {"tensor": 1, "expert": 1, "slice": 1}, "train": {"accumulate": 2}}
    )
    job = Job.of(program, "throughput", 4, past=PAST)
    (one,) = Search(program, job, CLUSTER, 10e6).outcomes()
    assert one.batch > 1
    assert one.score == pytest.approx(one.seconds / (one.batch * 4))
    step = Job.of(program, "training", 4, batch=16)
    assert (list(step.batches(4)), step.length, step.phase) == ([2], 32, "training")


def test_a_dense_model_has_data_and_tensor_alone() -> None:
    program = program_of({})
    job = Job.of(program, "training", 2, batch=4)
    outcomes = Search(program, job, Hardware.shipped("a100x2"), 1e9).outcomes()
    assert sorted((one.mesh.data, one.mesh.tensor) for one in outcomes) == [(1, 2), (2, 1)]
    assert all(one.fits for one in outcomes)


MISTAKES: dict[str, tuple[dict[str, Any], type[MoecError], str, str]] = {
    "objective": ({"objective": "latancy"}, PlanError, "'latancy'", "'latency'"),
    "ranks": ({"ranks": 8}, MeshError, "4 devices", ""),
    "axes": (
        {"plan": {**MOE, "parallel": {"tensor": 8}}}, PlanError, "tensor = 8 on 4 ranks", "",
    ),
    "heads": ({"plan": {"parallel": {"tensor": 4}}}, PlanError, "tensor = 4 for 2 attention heads", ""),
    "past": ({"past": 64}, PlanError, "64 positions", ""),
    "foreign": ({"sequence": 8}, PlanError, "a size that latency does not have", "--past"),
    "batch": ({"batch": 3, "plan": {"parallel": {"tensor": 1}}}, PlanError, "3 sequences", ""),
    "cluster": ({"cluster": "a100y"}, PlanError, "no hardware called 'a100y'", "'a100'"),
    "memory": (
        {"max_memory": 100, "plan": {**MOE, "parallel": {"tensor": 1}}}, PlanError, "none of which fits", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str) -> None:
    given, kind, found, near = MISTAKES[name]
    words: dict[str, Any] = {"cluster": CLUSTER, **given}
    with pytest.raises(kind) as error:
        moec.search(dense(), words.pop("cluster"), **words)
    assert found in error.value.found
    assert near in error.value.nearest + error.value.needed
    assert error.value.needed


def test_nothing_fits_names_a_change_that_would() -> None:
    plan = {**MOE, "parallel": {"tensor": 1, "expert": 1, "slice": 1}}
    program = program_of(plan)
    job = Job.of(program, "latency", 4, batch=4, past=PAST)
    (alone,) = Search(program, job, CLUSTER, 1e9).outcomes()
    limit = int(alone.memory["total"] - alone.memory["parameters"] * 0.3)
    with pytest.raises(PlanError) as error:
        moec.search(dense(), CLUSTER, plan=plan, batch=4, past=PAST, max_memory=limit)
    assert error.value.where == "memory of a rank"
    assert "of it parameters" in error.value.found
    assert "expert, slice left open in [parallel]" in error.value.nearest.replace("tensor, ", "")
    assert 'dtype = "bf16"' in error.value.nearest
