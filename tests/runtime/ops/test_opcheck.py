"""torch's own examination of each operator: schema, autograd registration, shape rule, AOT dispatch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import moec.runtime.ops  # noqa: F401
from moec.runtime.ops.route import GATES
from tests.runtime.ops.cases import Case

ops = torch.ops.moec
CASES = (Case(), Case(tokens=1, top_k=1, dtype=torch.float32), Case(tokens=3, experts=9, top_k=9, factor=0.5))


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("noise", ["none", "rsample"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_route(case: Case, gate: str, noise: str) -> None:
    opcheck(ops.route.default, (leaf(case.scores()), None, case.top_k, gate, noise, True))
    bias = case.draw(case.experts)
    opcheck(ops.route.default, (leaf(case.scores()), bias, case.top_k, gate, noise, True))


@pytest.mark.parametrize(("factor", "random"), [(0.0, False), (1.0, False), (0.5, True)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_assign(case: Case, factor: float, random: bool) -> None:
    _, experts, *_ = case.routed()
    opcheck(ops.assign.default, (experts, case.experts, factor, 1.0, 1, random, True))


@pytest.mark.parametrize("training", [True, False])
def test_jitter(training: bool) -> None:
    opcheck(ops.jitter.default, (leaf(Case().x()), 0.1, training))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows(case: Case) -> None:
    weights, _, order, counts = case.routed()
    rows, weight = leaf(case.rows(case.depth)), leaf(case.weight())
    bias = leaf(case.draw(case.experts, case.width))
    opcheck(ops.dispatch.default, (leaf(case.x()), order, case.top_k))
    opcheck(ops.grouped_linear.default, (rows, weight, None, counts))
    opcheck(ops.grouped_linear.default, (rows, weight, bias, counts))
    opcheck(ops.grouped_outer.default, (case.rows(case.width), case.rows(case.depth), counts))
    opcheck(ops.grouped_sum.default, (case.rows(case.width), counts))
    opcheck(ops.combine.default, (rows, leaf(weights), order, counts))


def test_losses() -> None:
    _, experts, *_ = Case().routed()
    opcheck(ops.balance_loss.default, (leaf(Case().scores()), experts))
    opcheck(ops.z_loss.default, (leaf(Case().scores()),))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_router(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 5, dtype=torch.promote_types(dtype, torch.float32))
    opcheck(ops.router.default, (leaf(torch.randn(7, 5, dtype=dtype)), leaf(weight)))
