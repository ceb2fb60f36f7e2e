"""Memory of routing and dispatch is linear in tokens * (K * width + E): no tokens x experts x capacity."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

import moec.runtime.ops  # noqa: F401

ops = torch.ops.moec
EXPERTS, WIDTH, TOP_K = 64, 8, 2


def largest_allocation(tokens: int) -> int:
    """Most bytes that one operator allocates for itself, forward and backward, products left aside."""
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    router = torch.randn(EXPERTS, WIDTH, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        scores = x @ router.t()
        weights, experts = ops.route(scores, None, TOP_K, "normalized", "rsample", True)
        order, counts = ops.assign(experts, EXPERTS, 1.0, 0.0, 4, True, True)
        y = ops.combine(ops.dispatch(x, order, TOP_K), weights, order, counts)
        (y.sum() + ops.balance_loss(scores, experts) + ops.z_loss(scores)).backward()
    return max(event.self_cpu_memory_usage for event in found.events())


def test_no_allocation_grows_faster_than_the_tokens() -> None:
    small, large = largest_allocation(64), largest_allocation(1024)
    one_hot = 1024 * EXPERTS * (1024 * TOP_K // EXPERTS)  # elements of a dispatch mask, at one byte each
    assert 0 < large <= 1.1 * 16 * small
    assert large < one_hot / 2
