"""`moec::linear` against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from moec.errors import OperatorError
from moec.runtime.ops.packed import PACKED, can_pack
from moec.testing.same_function import assert_same_function
from moec.testing.tolerances import error_of, tolerance_of

ops = torch.ops.moec
SHAPES = [(3, 5, 7, 11), (1, 2, 96, 200), (2, 64, 320, 1100), (0, 4, 8, 9)]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, bias: bool) -> list[Tensor]:
    batch, length, depth, width = shape
    made = [torch.randn(batch, length, depth), torch.randn(width, depth) / depth**0.5]
    made += [torch.randn(width)] if bias else []
    return [tensor.to(dtype) for tensor in made]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype, bias: bool) -> None:
    given = inputs(shape, dtype, bias)
    assert_same_function(F.linear, lambda x, w, b=None: ops.linear(x, w, b), given)


def test_second_derivatives() -> None:
    x, w, b = (tensor.requires_grad_() for tensor in inputs((2, 3, 4, 5), torch.float64, True))
    assert torch.autograd.gradgradcheck(ops.linear, (x, w, b))
    assert torch.autograd.gradcheck(ops.linear_outer, (x, torch.randn_like(x).requires_grad_()))


def test_gradients_of_any_stride_and_one_dimension() -> None:
    x, w = torch.randn(96, 300).t().requires_grad_(), torch.randn(40, 96).requires_grad_()
    grad = torch.randn(40, 300).t()
    found = torch.autograd.grad(ops.linear(x, w, None), [x, w], grad)
    needed = torch.autograd.grad(F.linear(x, w), [x, w], grad)
    for left, right in zip(found, needed, strict=True):
        assert error_of(left, right) <= tolerance_of(torch.float32)
    one = torch.randn(96)
    assert error_of(ops.linear(one, w, None), F.linear(one, w)) <= tolerance_of(torch.float32)


def test_registration() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = [t.requires_grad_() for t in inputs((2, 3, 96, 64), dtype, True)]
        opcheck(ops.linear.default, tuple(arguments))
    opcheck(ops.linear_outer.default, (torch.randn(3, 4), torch.randn(3, 5)))


def test_autocast_is_that_of_linear() -> None:
    x, w, b = inputs((2, 3, 96, 64), torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        found, needed = ops.linear(x, w, b), F.linear(x, w, b)
    assert found.dtype == needed.dtype == torch.bfloat16
    assert error_of(found, needed) <= tolerance_of(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_found(dtype: torch.dtype) -> None:
    x, w, b = inputs((1, 3, 96, 64), dtype, True)
    plain = ops.linear(x, w, b)
    assert PACKED.keep(w) == can_pack(w)
    found = ops.linear(x, w, b)
    assert error_of(found, plain) <= tolerance_of(dtype)
    w.zero_()
    assert torch.equal(ops.linear(x, w, b), b.expand(1, 3, 64))


def test_refusals_name_the_operator() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 5)
    with pytest.raises(OperatorError, match=r"moec::linear\n  found   weight \[4, 5\]"):
        ops.linear(x, w, None)
    with pytest.raises(OperatorError, match="bias"):
        ops.linear(x, torch.randn(4, 3), torch.randn(3))
    with pytest.raises(OperatorError, match="float64"):
        ops.linear(x.double(), torch.randn(4, 3), None)
