"""The gate's Triton kernels against `router`, `route` and `assign`: the same choices, the same table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moec.runtime.ops.route import GATES
from tests.runtime.ops.triton_layers import DEVICE, assert_close, kernels

pytest.importorskip("triton", reason="Triton has no build for this platform")
from moec.runtime.ops.triton.gate import gate, refusal

ops = torch.ops.moec
# (tokens, depth, experts, top_k): one program, several; a cut sum; K = E; more experts than tokens
SIZES = [
    (1, 7, 3, 1),
    (13, 7, 5, 2),
    (1, 600, 64, 4),
    (5, 33, 3, 3),
    (3, 8, 40, 5),
    (45, 19, 130, 4),
    (131, 8, 1, 1),
]


def check(x: Tensor, router: Tensor, bias: Tensor | None, top_k: int, kind: str) -> None:
    """All five results. Choices are compared on the scores that were found: rounding may order others."""
    scores, weights, experts, order, counts = gate(x, router, bias, top_k, kind)
    assert_close(scores, x.double() @ router.double().t(), torch.float32, "scores")
    needed_weights, needed_experts = ops.route(scores, bias, top_k, kind, "none", False)
    needed_order, needed_counts = ops.assign(needed_experts, router.shape[0], 0.0, 0.0, 4, False, False)
    assert torch.equal(experts, needed_experts)
    assert_close(weights, needed_weights.double(), torch.float32, "weights")
    assert torch.equal(order, needed_order)
    assert torch.equal(counts, needed_counts)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_the_three_operators(sizes: tuple[int, int, int, int], kind: str) -> None:
    tokens, depth, experts, top_k = sizes
    for dtype in (torch.float32, torch.bfloat16):
        for biased in (False, True):
            x = torch.randn(tokens, depth).to(DEVICE, dtype)
            bias = torch.randn(experts, device=DEVICE) / 5 if biased else None
            check(x, torch.randn(experts, depth).to(DEVICE, dtype), bias, top_k, kind)


def test_router_and_tokens_of_different_dtypes() -> None:
    check(
        torch.randn(9, 20).to(DEVICE, torch.bfloat16),
        torch.randn(4, 20, device=DEVICE),
        None,
        2,
        "normalized",
    )


def test_ties_go_to_the_lower_expert() -> None:
    x = torch.ones(40, 4, device=DEVICE)
    router = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], device=DEVICE)[:, None].expand(6, 4)
    _, _, experts, _, counts = gate(x, router, None, 3, "normalized")
    assert experts.tolist() == [[1, 2, 4]] * 40
    assert counts.tolist() == [0, 40, 40, 0, 40, 0]


def test_scores_without_end_or_meaning_still_name_experts_that_exist() -> None:
    """-inf for all but one expert; NaN everywhere: each token still has K different experts below E."""
    x = torch.ones(2, 3, device=DEVICE)
    x[1] = float("nan")
    router = torch.full((5, 3), float("-inf"), device=DEVICE)
    router[3] = 1.0
    _, _, experts, order, counts = gate(x, router, None, 4, "normalized")
    assert experts[0].tolist() == [3, 0, 1, 2]
    assert all(len(set(row)) == 4 and max(row) < 5 for row in experts.tolist())
    assert sorted(order.tolist()) == list(range(8))
    assert int(counts.sum()) == 8


def test_no_token() -> None:
    scores, weights, _, order, counts = gate(
        torch.empty(0, 3, device=DEVICE), torch.randn(4, 3, device=DEVICE), None, 2, "normalized"
    )
    assert (scores.shape, weights.shape, order.shape) == ((0, 4), (0, 2), (0,))
    assert counts.tolist() == [0] * 4


def test_registered_the_gate_has_its_gradient() -> None:
    """Through `torch.ops.moec.gate`, kernels beneath: the gradients of the plain operators."""
    x, router = torch.randn(11, 6, device=DEVICE), torch.randn(5, 6, device=DEVICE)
    leaves = [x.requires_grad_(), router.requires_grad_()]
    options = (None, 2, "straight-through", "none", 0.0, 0.0, 4, False, False)
    needed = ops.gate(x.double(), router.double(), *options)
    with kernels():
        found = ops.gate(x, router, *options)
        grads = [torch.autograd.grad((f[0].sin().sum() + f[1].sin().sum()), leaves) for f in (found, needed)]
    for left, right in zip(*grads, strict=True):
        assert_close(left, right.double(), torch.float32, "gradient")


@pytest.mark.parametrize(
    ("noise", "training", "factor", "dtype", "experts", "reason"),
    [
        ("rsample", True, 0.0, torch.float32, 4, "noise 'rsample' while training"),
        ("rsample", False, 0.0, torch.float32, 4, ""),
        ("none", True, 1.25, torch.float32, 4, "capacity factor 1.25"),
        ("none", True, 0.0, torch.float64, 4, "float64"),
        ("none", True, 0.0, torch.bfloat16, 1025, "1025 experts, more than 1024"),
    ],
)
def test_what_is_left_to_the_plain_operators_has_a_reason(
    noise: str, training: bool, factor: float, dtype: torch.dtype, experts: int, reason: str
) -> None:
    x, router = torch.empty(3, 5, dtype=dtype), torch.empty(experts, 5, dtype=dtype)
    assert refusal(x, router, noise, training, factor) == reason
