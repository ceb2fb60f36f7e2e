"""Arguments that mean nothing are refused in words: where, what was found, what is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import moec.runtime.ops  # noqa: F401
from moec.errors import OperatorError

ops = torch.ops.moec
S, W, X = torch.randn(6, 4), torch.randn(4, 5, 3), torch.randn(6, 3)
CHOSEN, COUNTS = torch.zeros(6, 1, dtype=torch.int64), torch.tensor([6, 0, 0, 0])

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "top_k": (lambda: ops.route(S, None, 5, "normalized", "none", True), "top_k 5 with 4 experts"),
    "top_k 0": (lambda: ops.route(S, None, 0, "normalized", "none", True), "top_k 0 with 4 experts"),
    "gate": (lambda: ops.route(S, None, 1, "normalised", "none", True), "'normalized'"),
    "noise": (lambda: ops.route(S, None, 1, "normalized", "sample", True), "'rsample'"),
    "bias": (lambda: ops.route(S, S[0, :3], 1, "normalized", "none", True), r"bias \[4\]"),
    "integers": (lambda: ops.route(CHOSEN, None, 1, "normalized", "none", True), "floating-point"),
    "epsilon": (lambda: ops.jitter(X, 1.5, True), "epsilon 1.5"),
    "range": (lambda: ops.assign(CHOSEN + 4, 4, 0.0, 0.0, 4, False, True), "expert indices 4 to 4"),
    "negative": (lambda: ops.assign(CHOSEN - 1, 4, 0.0, 0.0, 4, False, True), "expert indices -1 to -1"),
    "factor": (lambda: ops.assign(CHOSEN, 4, -1.0, 0.0, 4, False, True), "capacity_factor -1.0"),
    "few experts": (lambda: ops.assign(CHOSEN.expand(6, 3), 2, 0.0, 0.0, 4, False, True), "num_experts >= K"),
    "slots": (lambda: ops.dispatch(X, torch.arange(5), 1), "5 slots for 6 tokens"),
    "width": (lambda: ops.grouped_linear(S, W, None, COUNTS), "rows of width 4"),
    "dtype": (lambda: ops.grouped_linear(X.double(), W, None, COUNTS), "rows of torch.float64"),
    "counts": (lambda: ops.grouped_linear(X, W, None, COUNTS[:3]), "3 counts"),
    "too many": (lambda: ops.grouped_linear(X, W, None, COUNTS + 1), "split 6 rows"),
    "rows": (lambda: ops.combine(X[:5], S[:, :1], torch.arange(6), COUNTS), "5 rows, 6 slots"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(OperatorError, match=words) as raised:
        call()
    assert raised.value.where.startswith("moec::")
    assert raised.value.needed


def test_refused_before_anything_runs_on_meta() -> None:
    with pytest.raises(OperatorError, match="top_k 5 with 4 experts"):
        ops.route(S.to("meta"), None, 5, "normalized", "none", True)
