"""The Triton kernels on a real GPU, at sizes that fill their tiles; small and odd sizes are in
tests/runtime/ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moec.runtime.ops
from moec.runtime.ops import moe_ffn as plain
from moec.testing.tolerances import error_of, tolerance_of

pytestmark = pytest.mark.gpu
ops = torch.ops.moec
SWIGLU = "lambda h: silu(h[..., :{0}]) * h[..., {0}:]"
GELU = "lambda h: gelu(h)"


def layer(
    tokens: int, width: int, hidden: int, experts: int, top_k: int, packed: int, dtype: torch.dtype
) -> dict[str, Any]:
    """A layer's inputs on the GPU, its routing by the gate's kernels."""
    x = torch.randn(tokens, width, device="cuda", dtype=dtype)
    router = torch.randn(experts, width, device="cuda", dtype=dtype) / width**0.5
    _, weights, _, order, counts = ops.gate(
        x, router, None, top_k, "normalized", "none", 0.0, 0.0, 4, False, False
    )
    shapes = ((experts, packed * hidden, width), (experts, width, hidden))
    matrices = [torch.randn(*shape, device="cuda", dtype=dtype) / shape[2] ** 0.5 for shape in shapes]
    formula = SWIGLU.format(hidden) if packed == 2 else GELU
    biases = [None if packed == 2 else torch.randn(m.shape[:2], device="cuda", dtype=dtype) for m in matrices]
    return {
        "x": x,
        "weights": weights,
        "order": order,
        "counts": counts,
        "matrices": matrices,
        "biases": biases,
        "formula": formula,
    }


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in fp64, which the plain operators take."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: convert(value) for name, value in inputs.items()}


@pytest.mark.parametrize("packed", [1, 2])
@pytest.mark.parametrize("tokens", [1, 13, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layer(tokens: int, packed: int, dtype: torch.dtype) -> None:
    """Forward, and every gradient, against the plain operators in fp64 on the same GPU."""
    inputs = layer(tokens, 512, 384, 16, 4, packed, dtype)
    exact = in_double(inputs)
    grad = torch.randn(tokens, 512, device="cuda", dtype=dtype)
    y, ups = ops.moe_ffn_forward(**inputs, dense=None, mix=None, save=True)
    without, _ = ops.moe_ffn_forward(**inputs, dense=None, mix=None, save=False)
    needed_y, needed_ups = plain.forward(**exact, dense=None, mix=None, save=True)
    found = ops.moe_ffn_backward(grad, **inputs, ups=ups, needed=[True] * 4)
    needed = plain.backward(grad.double(), **exact, ups=needed_ups, needed=[True] * 4)
    pairs = [(y, needed_y), (without, needed_y), (found[0], needed[0]), (found[1], needed[1])]
    pairs += [*zip(found[2], needed[2], strict=True), *zip(found[3], needed[3], strict=True)]
    for place, (left, right) in enumerate(pairs):
        assert error_of(left, right) <= tolerance_of(dtype), place


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 64, 1), (16, 128, 8), (5000, 256, 16)])
def test_gate(tokens: int, experts: int, top_k: int) -> None:
    """Choices and table are those that the plain operators make of the same scores."""
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    router = torch.randn(experts, 512, device="cuda", dtype=torch.bfloat16)
    scores, weights, chosen, order, counts = ops.gate(
        x, router, None, top_k, "sigmoid", "none", 0.0, 0.0, 4, False, False
    )
    assert error_of(scores, x.double() @ router.double().t()) <= tolerance_of(torch.float32)
    needed_weights, needed_chosen = ops.route(scores, None, top_k, "sigmoid", "none", False)
    needed_order, needed_counts = ops.assign(needed_chosen, experts, 0.0, 0.0, 4, False, False)
    assert torch.equal(chosen, needed_chosen)
    assert error_of(weights, needed_weights) <= tolerance_of(torch.float32)
    assert torch.equal(order, needed_order)
    assert torch.equal(counts, needed_counts)


def test_more_than_two_to_the_31_elements() -> None:
    """The last tokens of a batch whose slots fill 8 GB get what they get alone."""
    inputs = layer(65600, 4096, 64, 8, 8, 2, torch.bfloat16)
    y, _ = ops.moe_ffn_forward(**inputs, dense=None, mix=None, save=True)
    last = layer(128, 4096, 64, 8, 8, 2, torch.bfloat16)
    last |= {"x": inputs["x"][-128:], "weights": inputs["weights"][-128:], "matrices": inputs["matrices"]}
    chosen = torch.empty(65600 * 8, dtype=torch.int64, device="cuda")
    chosen[inputs["order"]] = torch.repeat_interleave(torch.arange(8, device="cuda"), inputs["counts"])
    last["order"], last["counts"] = ops.assign(chosen.view(-1, 8)[-128:], 8, 0.0, 0.0, 4, False, False)
    alone, _ = ops.moe_ffn_forward(**last, dense=None, mix=None, save=True)
    assert error_of(y[-128:], alone) <= tolerance_of(torch.bfloat16)


def test_the_kernels_are_registered() -> None:
    """What is called here are Triton's kernels: they are on this GPU, and they are what CUDA tensors
    reach."""
    assert moec.runtime.ops.register.LIBRARY is not None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        test_layer(64, 2, torch.bfloat16)
        torch.cuda.synchronize()
    names = {event.name for event in profile.events()}
    assert {"_up", "_scatter", "_combine", "_pull_back", "_outer"} <= names
