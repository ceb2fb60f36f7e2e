"""Capacity and losses over many ranks, against one process that holds all tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir.mesh import Mesh
from moec.runtime.simulated import run_ranks

ops, c10d = torch.ops.moec, torch.ops._c10d_functional
RANKS = 3


def admitted(experts_TK: Tensor, num_experts: int, *limits: object) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`moec.admit` on RANKS ranks that hold stretches of the tokens."""
    parts = experts_TK.tensor_split(RANKS)

    def run(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        picked = ops.choices(parts[rank], num_experts)
        choices = c10d.wait_tensor(c10d.all_gather_into_tensor(picked, RANKS, "data"))
        found: tuple[Tensor, Tensor, Tensor] = ops.admit(parts[rank], choices, "data", *limits)
        return found

    return run_ranks(Mesh(RANKS), run)


def kept_slots(order_N: Tensor, counts_E: Tensor) -> list[tuple[int, int]]:
    """(expert, slot) of every kept slot, in order."""
    kept = order_N[: int(counts_E.sum())].tolist()
    experts = torch.arange(counts_E.numel()).repeat_interleave(counts_E).tolist()
    return list(zip(experts, kept, strict=True))


@settings(max_examples=25)
@given(
    st.integers(0, 12), st.integers(1, 3), st.integers(3, 5), st.sampled_from((0.0, 0.4, 1.0, 2.0)),
    st.sampled_from((0, 1, 4)), st.integers(0, 99), st.booleans(),
)  # fmt: skip
def test_the_rows_that_one_process_keeps(
    num_tokens: int, top_k: int, num_experts: int, factor: float, minimum: int, seed: int, skewed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    scores[:, 0] += float(skewed)  # everyone's first choice
    experts = scores.argsort(1, descending=True)[:, :top_k].contiguous()
    limits = (factor, 0.0, minimum, False, True)
    order, counts = ops.assign(experts, num_experts, *limits)
    needed = kept_slots(order, counts)
    found, start = [], 0
    for part, (local_order, local_counts, kept) in zip(
        experts.tensor_split(RANKS), admitted(experts, num_experts, *limits), strict=True
    ):
        found += [(expert, slot + start) for expert, slot in kept_slots(local_order, local_counts)]
        assert torch.equal(kept, counts)
        start += part.numel()
    assert sorted(found) == needed


def test_random_selection_fills_every_place_once_and_no_more() -> None:
    torch.manual_seed(0)
    experts = torch.zeros(30, 1, dtype=torch.long)
    experts[25:] = 1
    found = admitted(experts, 2, 0.5, 0.5, 0, True, True)
    assert sum(counts for _, counts, _ in found).tolist() == [8, 5]  # type: ignore[attr-defined]
    assert [int(counts[0]) for _, counts, _ in found] == [3, 3, 2]  # in proportion to 10, 10 and 5 choices


@pytest.mark.parametrize("num_tokens", [2, 8])
def test_shares_of_the_losses_add_up(num_tokens: int) -> None:
    scores = torch.randn(num_tokens, 4, dtype=torch.float64, requires_grad=True)
    experts = scores.detach().topk(2).indices
    chosen = experts.flatten().bincount(minlength=4)
    for whole, share in (
        (ops.balance_loss(scores, experts), ops.balance_share),
        (ops.z_loss(scores), ops.z_share),
    ):
        parts = [share(part, chosen, 2) for part in scores.tensor_split(RANKS)]
        together = torch.stack(parts).sum()
        torch.testing.assert_close(together, whole, rtol=1e-12, atol=0)
        needed, found = (torch.autograd.grad(value, scores)[0] for value in (whole, together))
        torch.testing.assert_close(found, needed, rtol=1e-10, atol=1e-14)
