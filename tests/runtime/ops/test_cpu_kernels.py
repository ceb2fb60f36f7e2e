"""The CPU's own kernels of `gate` and `moe_ffn`, held to those for any device and to the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.runtime.ops import moe_ffn as any_device
from moec.runtime.ops import reference
from moec.runtime.ops.gate import gate_by_parts
from moec.runtime.ops.packed import PACKED, can_pack
from moec.testing.tolerances import error_of, tolerance_of

ops = torch.ops.moec
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SWIGLU = "lambda gate, up: silu(gate) * up"
COUNTS = {
    "uneven": ([40, 0, 3, 21], 0),
    "all on one": ([0, 64, 0, 0], 0),
    "dropped": ([10, 1, 0, 4], 49),
    "nothing kept": ([0, 0, 0, 0], 64),
}


class Layer:
    """Random inputs of a layer of four experts, wide enough for every kernel of the table."""

    def __init__(self, counts: list[int], dropped: int, dtype: torch.dtype, top_k: int = 2) -> None:
        slots = sum(counts) + dropped
        tokens, width, inner = slots // top_k, 96, 160
        self.counts, self.order = torch.tensor(counts), torch.randperm(slots)
        self.x = torch.randn(tokens, width).to(dtype)
        self.weights = torch.rand(tokens, top_k, dtype=torch.promote_types(dtype, torch.float32))
        shapes = [(inner, width), (inner, width), (width, inner)]
        self.matrices = [(torch.randn(4, *shape) / shape[1] ** 0.5).to(dtype) for shape in shapes]
        self.biases = [torch.randn(4, shape[0]).to(dtype) for shape in shapes]

    def inputs(self) -> list[Tensor]:
        return [self.x, self.weights, *self.matrices, *self.biases]

    def run(self, x: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
        """By the operator."""
        out: Tensor = ops.moe_ffn(x, weights, self.order, self.counts, rest[:3], rest[3:], SWIGLU)
        return out

    def slowly(self, x: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
        """By the reference's loops."""
        top_k = weights.shape[1]
        rows = reference.dispatch(x, self.order, top_k)
        gate, up = (reference.grouped_linear(rows, rest[i], rest[3 + i], self.counts) for i in (0, 1))
        out = reference.grouped_linear(F.silu(gate) * up, rest[2], rest[5], self.counts)
        return reference.combine(out, weights, self.order, self.counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", COUNTS)
def test_values_and_gradients_against_the_reference(case: str, dtype: torch.dtype) -> None:
    layer = Layer(*COUNTS[case], dtype)
    exact = [tensor.double().requires_grad_() for tensor in layer.inputs()]
    needed = layer.slowly(*exact)
    leaves = [tensor.requires_grad_() for tensor in layer.inputs()]
    found = layer.run(*leaves)
    grad = torch.randn(needed.shape, dtype=torch.float64).to(dtype)
    assert error_of(found, needed) <= tolerance_of(dtype)
    wanted = [torch.zeros_like(tensor) for tensor in exact]
    if needed.requires_grad:  # with every slot dropped the reference is a constant
        wanted = list(torch.autograd.grad(needed, exact, grad.double()))
    for left, right in zip(torch.autograd.grad(found, leaves, grad), wanted, strict=True):
        assert error_of(left, right) <= tolerance_of(dtype)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_without_gradients(dtype: torch.dtype, top_k: int) -> None:
    counts = [1] * top_k + [0] * (4 - top_k)
    layer = Layer(counts, 0, dtype, top_k)
    needed = layer.slowly(*(tensor.double() for tensor in layer.inputs()))
    found = layer.run(*layer.inputs())
    assert found.dtype == dtype
    assert error_of(found, needed) <= tolerance_of(dtype)
    with_gradients = layer.run(*(tensor.requires_grad_() for tensor in layer.inputs()))
    assert error_of(found, with_gradients) <= tolerance_of(dtype)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_experts_are_found(dtype: torch.dtype, tokens: int) -> None:
    layer = Layer([tokens, 0, tokens, 0], 0, dtype)
    plain = layer.run(*layer.inputs())
    for matrix in layer.matrices:
        assert PACKED.keep(matrix) == can_pack(matrix)
    assert error_of(layer.run(*layer.inputs()), plain) <= tolerance_of(dtype)
    layer.matrices[2].zero_()
    zeroed = [layer.x, layer.weights, *layer.matrices, *(b.zero_() for b in layer.biases)]
    assert not layer.run(*zeroed).any()


def test_inputs_and_gradients_of_any_stride() -> None:
    layer = Layer([40, 0, 3, 21], 0, torch.float32)
    turned = [t.mT.contiguous().mT.requires_grad_() for t in layer.inputs()]
    plain = [t.clone().requires_grad_() for t in layer.inputs()]
    grad = torch.randn(96, 32).t()
    found = torch.autograd.grad(layer.run(*turned), turned, grad)
    needed = torch.autograd.grad(layer.run(*plain), plain, grad.contiguous())
    for left, right in zip(found, needed, strict=True):
        assert error_of(left, right) <= tolerance_of(torch.float32)


def test_only_what_is_wanted_is_computed() -> None:
    layer = Layer([40, 0, 3, 21], 0, torch.float64)
    _, ups = ops.moe_ffn_forward(
        layer.x,
        layer.weights,
        layer.order,
        layer.counts,
        layer.matrices,
        layer.biases,
        SWIGLU,
        None,
        None,
        True,
    )
    grad = torch.randn_like(layer.x)
    given = (
        grad,
        layer.x,
        layer.weights,
        layer.order,
        layer.counts,
        layer.matrices,
        layer.biases,
        SWIGLU,
        ups,
    )
    every = _flat(any_device.backward(*given, [True] * 4))
    for wanted in range(4):
        needed = [place == wanted for place in range(4)]
        found = _flat(ops.moe_ffn_backward(*given, needed))
        for part, all_of_it in zip(found, every, strict=True):
            assert not part.numel() or error_of(part, all_of_it) <= tolerance_of(torch.float64)
        assert [bool(t.numel()) for t in found] == [needed[0], needed[1], *[needed[2]] * 3, *[needed[3]] * 3]


def _flat(gradients: tuple[Tensor, Tensor, list[Tensor], list[Tensor]]) -> list[Tensor]:
    to_x, to_weights, to_matrices, to_biases = gradients
    return [to_x, to_weights, *to_matrices, *to_biases]


@pytest.mark.parametrize("gate", ["probability", "normalized", "straight-through", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("bias", [None, [3.0, 0.0, -2.0, 1.0, 0.0]])
def test_the_gate_of_one_token(gate: str, top_k: int, bias: list[float] | None) -> None:
    x, router = torch.randn(1, 8), torch.randn(5, 8)
    shift = None if bias is None else torch.tensor(bias)
    for factor in (0.0, 0.1, 1.0):
        given = (x, router, shift, top_k, gate, "none", factor, factor, 0, False, False)
        for left, right in zip(ops.gate(*given), gate_by_parts(*given), strict=True):
            assert torch.equal(left, right)
