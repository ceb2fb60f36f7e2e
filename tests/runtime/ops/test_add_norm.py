"""A residual sum and its norm in one operator: values and gradients, plain and in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.errors import OperatorError
from moec.testing import tolerance_of
from moec.testing.same_function import assert_same_function, compare

ops = torch.ops.moec
SHAPES = [(2, 3, 7), (1, 1, 1), (5, 64), (0, 4)]


def by_hand(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor]:
    sums = x + y
    values = sums - sums.mean(-1, keepdim=True) if centred else sums
    normed = values / ((values * values).mean(-1, keepdim=True) + 1e-5) ** 0.5
    normed = normed if weight is None else normed * weight
    return sums, normed if bias is None else normed + bias


def operator(centred: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    if centred:
        return lambda x, y, w=None, b=None: ops.add_layer_norm(x, y, w, b, 1e-5)
    return lambda x, y, w=None: ops.add_rms_norm(x, y, w, 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("centred", "weights"), [(False, 0), (False, 1), (True, 0), (True, 1), (True, 2)])
def test_against_the_formula(shape: tuple[int, ...], centred: bool, weights: int) -> None:
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    inputs += [torch.randn(shape[-1], dtype=torch.float64) for _ in range(weights)]

    def needed(
        x: Tensor, y: Tensor, w: Tensor | None = None, b: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return by_hand(x, y, w, b, centred)

    assert_same_function(needed, operator(centred), inputs)


def test_one_result_alone() -> None:
    """Gradients where only the sum, or only the norm, is read."""
    inputs = [torch.randn(3, 8, dtype=torch.float64) for _ in range(2)] + [
        torch.randn(8, dtype=torch.float64)
    ]
    for place in (0, 1):
        assert_same_function(
            lambda x, y, w: by_hand(x, y, w, None, True)[place] + 0 * w,  # noqa: B023
            lambda x, y, w: operator(True)(x, y, w)[place] + 0 * w,  # noqa: B023
            inputs,
        )


def test_opcheck() -> None:
    x, y = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(8, requires_grad=True) for _ in range(2))
    opcheck(ops.add_rms_norm.default, (x, y, w, 1e-5))
    opcheck(ops.add_layer_norm.default, (x, y, w, b, 1e-5))
    opcheck(ops.add_layer_norm.default, (x, y, None, None, 1e-5))
    sums = torch.randn(3, 8)
    opcheck(ops.add_norm_backward.default, (sums, sums, sums, w.detach(), True, True, 1e-5))
    opcheck(ops.add_norm_backward.default, (None, sums, sums, None, False, False, 1e-5))


def test_refuses() -> None:
    with pytest.raises(OperatorError, match="one shape"):
        ops.add_rms_norm(torch.ones(2, 3), torch.ones(3), None, 1e-5)
    with pytest.raises(OperatorError, match=r"a weight \[2\]"):
        ops.add_rms_norm(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width"), [((1,), 1), ((2, 3), 7), ((5,), 64), ((2,), 130), ((0,), 8)], ids=str
)
def test_triton(dtype: torch.dtype, rows: tuple[int, ...], width: int) -> None:
    """In the interpreter, with and without weights, against float64."""
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    from moec.runtime.ops.triton.register import interpreting

    x, y = (torch.randn(*rows, width).to(dtype) for _ in range(2))
    w, b = (torch.randn(width).to(dtype) for _ in range(2))
    total, zero = x.double() + y.double(), torch.zeros(*rows, width).double()
    with interpreting():
        for centred, weights in ((False, ()), (False, (w,)), (True, ()), (True, (w, b))):
            found = operator(centred)(x, y, *weights)
            first, second = ([weight.double() for weight in weights] + [None, None])[:2]
            _, normed = by_hand(
                found[0].double(), zero, first, second, centred
            )  # the norm reads the rounded sum
            assert found[0].dtype == dtype
            compare({"sums": found[0].double()}, {"sums": total}, tolerance_of(dtype))
            compare({"normed": found[1].double()}, {"normed": normed}, tolerance_of(dtype))
