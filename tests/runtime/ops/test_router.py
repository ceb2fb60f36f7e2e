"""`moec::router`: equal to dot products one at a time, and as wide under autocast as outside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moec.runtime.ops
from moec.runtime.ops import reference
from moec.testing import assert_same_function, error_of, tolerance_of


@given(tokens=st.integers(1, 9), width=st.integers(1, 7), experts=st.integers(1, 11))
def test_values_and_gradients(tokens: int, width: int, experts: int) -> None:
    x = torch.randn(tokens, width, dtype=torch.float64)
    weight = torch.randn(experts, width, dtype=torch.float64)
    assert_same_function(reference.router, torch.ops.moec.router, (x, weight), gradients=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_under_autocast(dtype: torch.dtype) -> None:
    x = torch.randn(64, 32).to(dtype).requires_grad_()
    weight = torch.randn(8, 32, requires_grad=True)
    needed = reference.router(x.double(), weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = torch.ops.moec.router(x, weight)
        scores.square().sum().backward()
    assert scores.dtype == torch.float32
    assert error_of(scores, needed) <= tolerance_of(torch.float32)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_a_weight_of_another_width_is_refused() -> None:
    with pytest.raises(moec.errors.OperatorError, match=r"weight \[E, 4\]"):
        torch.ops.moec.router(torch.randn(3, 4), torch.randn(2, 5))
