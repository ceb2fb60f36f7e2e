"""What is observed of a step is what happened in it, and observing changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moec.plan import Train
from moec.program import Program
from moec.runtime.balance import loads_of
from moec.runtime.batch_loss import BatchLoss
from moec.runtime.observed import Observed, Observer, entropy_sum
from moec.runtime.ops.sent import Sent
from moec.runtime.records import read_records
from moec.runtime.simulated import run_ranks
from moec.runtime.step import OptimizerStep
from moec.runtime.traffic import count_traffic
from moec.runtime.trainable import Trainable
from tests.runtime.rank_runs import PYRAMID, compiled, plan, random_batches, train_on
from tests.runtime.tiny import tiny_settings, tiny_text

BATCH = random_batches(1, 6)[0]
TWO_PARTS = tiny_settings(batch=6, accumulate=2)


# entropy


@settings(deadline=None)
@given(tokens=st.integers(0, 5), experts=st.integers(1, 40), level=st.floats(-50, 50))
@pytest.mark.parametrize("gate", ["probability", "sigmoid"])
def test_no_opinion_is_log_e(tokens: int, experts: int, level: float, gate: str) -> None:
    found = entropy_sum(torch.full((tokens, experts), level, dtype=torch.float64), gate)
    assert float(found) == pytest.approx(tokens * math.log(experts), abs=1e-9)


@settings(deadline=None)
@given(chosen=st.lists(st.integers(0, 6), min_size=1, max_size=5))
@pytest.mark.parametrize("gate", ["probability", "sigmoid"])
def test_one_expert_for_sure_is_nothing(chosen: list[int], gate: str) -> None:
    scores = torch.full((len(chosen), 7), -2000.0)
    scores[range(len(chosen)), chosen] = 2000.0
    assert float(entropy_sum(scores, gate)) == 0.0


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=1, max_size=4),
    shift=st.floats(-9, 9),
)
def test_entropy_is_that_of_the_distribution(rows: list[list[float]], shift: float) -> None:
    needed = 0.0
    for row in rows:
        weights = [math.exp(score - max(row)) for score in row]
        shares = [weight / sum(weights) for weight in weights]
        needed -= sum(share * math.log(share) for share in shares if share > 0)
    scores = torch.tensor(rows, dtype=torch.float64)
    assert float(entropy_sum(scores, "normalized")) == pytest.approx(needed, abs=1e-9)
    assert float(entropy_sum(scores + shift, "normalized")) == pytest.approx(needed, abs=1e-9)


# a step


def observed_step(
    program: Trainable, train: Train = TWO_PARTS, batch: tuple[Tensor, Tensor] = BATCH
) -> tuple[Observed, BatchLoss]:
    """A step of `program`, and what an observer saw of it."""
    program.train()
    step = OptimizerStep(program, train)
    observer = Observer(program, step.ranks)
    with observer.step():
        loss, _ = step.take(batch, train.lr, observer=observer)
    return observer.observed(1, loss.counts), loss


class _Scores(TorchDispatchMode):
    """Remembers what routers gave, operator by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func) == "moec.router.default":
            self.seen.append(result)
        return result


def test_entropies_are_those_of_the_scores_of_all_parts() -> None:
    program = compiled(plan())
    with _Scores() as scores:
        found, _ = observed_step(program)
    first, last, *rest = scores.seen  # of two layers, in two parts
    assert len(rest) == 2
    for layer, parts in (("moe_0", [first, rest[0]]), ("moe_1", [last, rest[1]])):
        share_TE = torch.cat(parts).detach().softmax(-1)
        mean = -(share_TE * share_TE.log()).sum(-1).mean()
        assert found.router_entropy[layer] == pytest.approx(float(mean), rel=1e-12)
    assert list(found.router_entropy) == list(program.moe_settings())
    assert found.traffic == {}


@pytest.mark.parametrize(
    "change", ["fused", "recomputed", pytest.param("compiled", marks=pytest.mark.nightly)]
)
def test_however_a_program_runs_the_same_is_heard(change: str) -> None:
    needed, _ = observed_step(compiled(plan()))
    program, train = compiled(plan()), TWO_PARTS
    if change == "recomputed":
        train = tiny_settings(batch=6, accumulate=2, recompute=True)
    else:
        program.backend = {"fused": "fused", "compiled": "aot_eager"}[change]
    found, _ = observed_step(program, train)
    assert found.counts == needed.counts
    assert found.router_entropy == pytest.approx(needed.router_entropy, rel=1e-12)


def test_an_observed_step_is_the_same_to_the_bit() -> None:
    observed, plain = compiled(plan(), dropout=0.2), compiled(plan(), dropout=0.2)
    torch.manual_seed(3)
    _, loss = observed_step(observed)
    torch.manual_seed(3)
    step = OptimizerStep(plain.train(), TWO_PARTS)
    other, _ = step.take(BATCH, TWO_PARTS.lr)
    assert loss.terms == other.terms
    for (name, mine), (_, theirs) in zip(observed.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_what_was_dropped_is_missing_in_the_counts(factor: float) -> None:
    moe = {**PYRAMID, "capacity_factor": factor, "min_capacity": 1}
    program = compiled(plan(moe))
    found, loss = observed_step(program)
    load = loads_of(loss.counts, program.moe_settings(), BATCH[0].numel())
    for layer, counts in found.counts.items():
        slots, each = 6 * 8 * 2, 2 * math.ceil(3 * 8 * 2 / len(counts) * factor)  # of two parts together
        assert max(counts) <= each
        assert load[layer].dropped == pytest.approx(1 - sum(counts) / slots)
        assert load[layer].dropped >= (0.5 - 1e-9 if factor == 0.5 else 0.0)
        assert (sum(counts) == slots) == (load[layer].dropped == 0.0)
    assert factor != 4.0 or all(sum(counts) == 96 for counts in found.counts.values())


# ranks


@pytest.mark.parametrize(
    "parallel",
    [{"data": 2, "tensor": 2, "expert": 4}, {"data": 4, "expert": 2, "slice": 2}],
    ids=str,
)
def test_on_ranks_it_is_the_whole_job(parallel: dict[str, int]) -> None:
    """Traffic is to the byte what is counted at every operator; counts and entropies are those of one
    process."""
    placed = compiled(plan(None, **parallel), 4)
    assert placed.layout is not None
    told = run_ranks(placed.layout.mesh, lambda rank: _counted(placed, rank))
    needed: dict[str, Sent] = {}
    for by_axis, _ in told:
        for axis, sent in by_axis.items():
            needed[axis] = needed.get(axis, Sent()) + sent
    alone, _ = observed_step(compiled(plan()))
    for _, found in told:
        assert found == told[0][1]
        seen = {axis: (sending.messages, sending.bytes) for axis, sending in found.traffic.items()}
        assert seen == {axis: (sent.messages, sent.bytes) for axis, sent in needed.items() if sent.messages}
        assert found.counts == alone.counts
        assert found.router_entropy == pytest.approx(alone.router_entropy, rel=1e-9)


def test_a_run_records_the_whole_job_in_the_steps_it_logs(tmp_path: Path) -> None:
    data = tiny_text(tmp_path)
    how = {"steps": 3, "log_every": 2, "eval_every": 0}
    train_on(1, plan(), data, tmp_path / "one", **how)
    train_on(2, plan(None, expert=2), data, tmp_path / "two", **how)
    alone, ranks = (
        [row for row in read_records(tmp_path / name / "train.jsonl") if row["kind"] == "observed"]
        for name in ("one", "two")
    )
    assert [row["step"] for row in ranks] == [row["step"] for row in alone] == [2, 3]
    for mine, needed in zip(ranks, alone, strict=True):
        assert mine["counts"] == needed["counts"]
        assert mine["router_entropy"] == pytest.approx(needed["router_entropy"], rel=1e-9)
        assert needed["traffic"] == {}
        assert mine["traffic"]["expert_2"]["bytes"] > 0


def _counted(placed: Program, rank: int) -> tuple[dict[str, Sent], Observed]:
    """By axis, what the operators of a step sent, and what an observer says of the job."""
    local = placed.partition(rank).train()
    step = OptimizerStep(local, TWO_PARTS)
    observer = Observer(local, step.ranks)
    with count_traffic() as traffic, observer.step():
        loss, _ = step.take(BATCH, TWO_PARTS.lr, observer=observer)
    by_axis: dict[str, Sent] = {}
    for kind, sent in traffic.sent.items():
        by_axis[kind.axis] = by_axis.get(kind.axis, Sent()) + sent
    return by_axis, observer.observed(1, loss.counts)
