"""`grouped_linear` where small random cases show nothing: large products, odd strides, autocast, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moec.runtime.ops import reference
from moec.runtime.ops.buffers import GRADIENTS
from moec.runtime.ops.products import choice
from moec.testing.same_function import assert_same_function

ops = torch.ops.moec
COUNTS = ([96, 0, 31, 1, 0], [0, 0, 0, 128, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5])


def layer(dtype: torch.dtype, depth: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(128, depth, dtype=dtype),
        torch.randn(5, width, depth, dtype=dtype) / depth**0.5,
        torch.randn(5, width, dtype=dtype),
    )


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_large_enough_for_every_kernel(dtype: torch.dtype, counts: list[int]) -> None:
    rows, weight, bias = layer(dtype, 192, 160)
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        assert choice(96, 160, 192, dtype).name == "onednn"
        assert choice(1, 160, 192, dtype).name == "mm"
    table = torch.tensor(counts)
    assert_same_function(
        lambda rows, weight, bias: reference.grouped_linear(rows, weight, bias, table),
        lambda rows, weight, bias: ops.grouped_linear(rows, weight, bias, table),
        [rows, weight, bias],
    )


@pytest.mark.parametrize("depth", [8, 192])
@pytest.mark.parametrize("grad", ["expanded", "transposed", "sliced"])
def test_gradients_of_any_stride(grad: str, depth: int) -> None:
    rows, weight, bias = (tensor.requires_grad_() for tensor in layer(torch.float32, depth, 160))
    counts = torch.tensor([96, 0, 31, 1, 0])
    cotangent = {
        "expanded": torch.randn(1, 1).expand(128, 160),
        "transposed": torch.randn(160, 128).t(),
        "sliced": torch.randn(128, 320)[:, ::2],
    }[grad]
    leaves = [rows, weight, bias]
    found = torch.autograd.grad(ops.grouped_linear(*leaves, counts), leaves, cotangent)
    needed = torch.autograd.grad(ops.grouped_linear(*leaves, counts), leaves, cotangent.contiguous())
    for left, right in zip(found, needed, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


def test_inputs_of_any_stride() -> None:
    rows, weight, _ = layer(torch.float32, 192, 160)
    counts = torch.tensor([96, 0, 31, 1, 0])
    needed = ops.grouped_linear(rows, weight, None, counts)
    strided = ops.grouped_linear(rows.t().contiguous().t(), weight.mT.contiguous().mT, None, counts)
    torch.testing.assert_close(strided, needed)


def test_empty_experts_get_zero_gradients_whatever_the_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def dirty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(GRADIENTS, "empty", dirty)
    for counts in COUNTS:
        found = ops.grouped_outer(torch.randn(128, 3), torch.randn(128, 2), torch.tensor(counts))
        empty = torch.tensor(counts) == 0
        assert found[empty].eq(0).all()
        assert found[~empty].abs().gt(0).all()


@pytest.mark.parametrize("frozen", ["rows", "weight", "bias"])
def test_only_the_gradients_asked_for_are_computed(frozen: str) -> None:
    names = ("rows", "weight", "bias")
    leaves = dict(zip(names, layer(torch.float64, 8, 3), strict=True))
    for name, tensor in leaves.items():
        tensor.requires_grad_(name != frozen)
    ops.grouped_linear(*leaves.values(), torch.tensor([1, 2, 3, 4, 5])).sum().backward()
    assert [name for name, tensor in leaves.items() if tensor.grad is None] == [frozen]


def test_autocast_runs_in_its_dtype_as_linear_does() -> None:
    rows, weight, bias = (tensor.requires_grad_() for tensor in layer(torch.float32, 8, 3))
    counts = torch.tensor([96, 0, 31, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.grouped_linear(rows, weight, bias, counts)
        assert out.dtype == torch.bfloat16
    needed = ops.grouped_linear(rows.bfloat16(), weight.bfloat16(), bias.bfloat16(), counts)
    assert torch.equal(out, needed)
    out.float().square().sum().backward()
    assert all(
        tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in (rows, weight, bias)
    )


def test_autocast_leaves_float64_routing_and_losses_alone() -> None:
    scores = torch.randn(6, 5)
    rows, weight, _ = layer(torch.float64, 8, 3)
    plain = ops.route(scores, None, 2, "normalized", "none", False)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ops.route(scores, None, 2, "normalized", "none", False)
        assert ops.grouped_linear(rows, weight, None, torch.tensor([1, 2, 3, 4, 5])).dtype == torch.float64
        assert ops.balance_loss(scores, cast[1]).dtype == torch.float32
        assert ops.z_loss(scores).dtype == torch.float32
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


def test_experts_without_rows_are_not_read() -> None:
    rows, weight, bias = layer(torch.float32, 192, 160)
    weight[1], bias[1], weight[4], bias[4] = (float("nan") for _ in range(4))
    assert ops.grouped_linear(rows, weight, bias, torch.tensor([96, 0, 31, 1, 0])).isfinite().all()


def test_the_same_call_gives_the_same_bits() -> None:
    rows, weight, bias = layer(torch.float32, 192, 160)
    counts = torch.tensor([96, 0, 31, 1, 0])
    runs = [ops.grouped_linear(rows, weight, bias, counts) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_saved_activations_are_the_inputs() -> None:
    """Nothing of size rows x experts, and no copy of the weight, waits for the backward pass."""
    rows, weight, bias = (tensor.requires_grad_() for tensor in layer(torch.float64, 8, 3))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    counts = torch.tensor([1, 2, 3, 4, 5])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.grouped_linear(rows, weight, bias, counts)
    assert {tensor.data_ptr() for tensor in saved} <= {t.data_ptr() for t in (rows, weight, bias, counts)}
