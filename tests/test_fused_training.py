"""Training with `backend = "fused"`: the same steps, less kept between forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from moec.plan import Train
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

STEP = Train(batch=4, sequence=8, accumulate=2, lr=1e-2, clip=0.5)
BIASED: dict[str, Any] = {**PYRAMID, "balance": "bias", "noise": "rsample", "capacity_factor": 1.0}


def fused(moe: dict[str, Any] = PYRAMID, **parallel: Any) -> dict[str, Any]:
    described = plan(moe, **parallel)
    return {**described, "compile": {**described["compile"], "backend": "fused"}}


def steps(described: dict[str, Any], settings: Train = STEP, **how: Any) -> Steps:
    torch.manual_seed(4)
    return take_steps(compiled(described, **how), settings, random_batches(3, settings.batch))


def assert_same(found: Steps, expected: Steps, tolerance: float) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=tolerance)
    for name, value in expected.parameters.items():
        scale = value.abs().max().clamp_min(1e-3)
        assert float((found.parameters[name] - value).abs().max() / scale) <= tolerance, name


@pytest.mark.parametrize("moe", [PYRAMID, BIASED], ids=["pyramid", "noise, capacity and biases"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_three_steps_are_the_same(moe: dict[str, Any], dropout: float) -> None:
    assert_same(steps(fused(moe), dropout=dropout), steps(plan(moe), dropout=dropout), 1e-9)


def test_bf16_learns_alike() -> None:
    settings = STEP.model_copy(update={"dtype": "bf16"})
    found, expected = (steps(d, settings, dtype=torch.float32) for d in (fused(), plan()))
    assert {value.dtype for value in found.parameters.values()} == {torch.float32}
    assert found.losses == pytest.approx(expected.losses, rel=5e-3)


def test_ranks_that_draw_numbers() -> None:
    """Two ranks of a tensor group draw alike, fused as apart."""
    batches = random_batches(2, STEP.batch)
    runs = []
    for described in (fused(expert=2, tensor=2), plan(expert=2, tensor=2)):
        torch.manual_seed(4)
        runs.append(take_steps_on_ranks(compiled(described, 2, dropout=0.2), STEP, batches))
    assert_same(runs[0], runs[1], 1e-9)


def bytes_kept(described: dict[str, Any], settings: Train = STEP) -> int:
    """What autograd holds on to between the forward and the backward of a batch."""
    program = compiled(described)
    weights = {parameter.untyped_storage().data_ptr() for parameter in program.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        OptimizerStep(program.train(), settings).gradients(random_batches(1, settings.batch)[0])
    return sum(size for place, size in kept.items() if place not in weights)


def test_less_is_kept() -> None:
    """Neither gathered rows nor activations nor answers: of an expert layer, the up products alone."""
    assert bytes_kept(fused()) < 0.85 * bytes_kept(plan())


def test_recomputation_changes_no_bit_and_keeps_less() -> None:
    again = STEP.model_copy(update={"recompute": True})
    left, right = (steps(fused(BIASED), settings, dropout=0.2) for settings in (STEP, again))
    assert left.losses == right.losses
    assert all(torch.equal(value, right.parameters[name]) for name, value in left.parameters.items())
    assert bytes_kept(fused(), again) < 0.8 * bytes_kept(fused())


def test_a_program_read_back_runs_as_its_plan_says(tmp_path: Path) -> None:
    program = compiled(fused()).eval()
    again = moec.load(program.save(tmp_path / "program"))
    assert (again.backend, again.executed is not again.graph) == ("fused", True)
    tokens = random_batches(1, 2)[0][0]
    assert torch.equal(again(tokens), program(tokens))
    assert "moec.moe_ffn" not in str(again)
