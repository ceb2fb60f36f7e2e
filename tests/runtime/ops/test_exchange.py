"""Rows that travel: where they arrive, and the exact transpose on the way back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec import OperatorError
from moec.ir.mesh import Mesh
from moec.runtime.simulated import run_ranks

ops, c10d = torch.ops.moec, torch.ops._c10d_functional


@given(
    st.integers(1, 4).flatmap(
        lambda a: st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=a, max_size=a)
    ),
    st.integers(0, 2),
)
def test_regroup_turns_blocks(counts: list[list[int]], later: int) -> None:
    table = torch.tensor(counts)
    rows = torch.arange(int(table.sum()) + later, dtype=torch.float64).unsqueeze(1)
    blocks = list(rows[: int(table.sum())].split(table.reshape(-1).tolist()))
    turned = [blocks[a * 2 + b] for b in range(2) for a in range(len(counts))]
    needed = torch.cat([*turned, rows[int(table.sum()) :]])
    assert torch.equal(ops.regroup(rows, table), needed)
    assert torch.equal(ops.regroup(needed, table.t()), rows)
    torch.library.opcheck(ops.regroup.default, (rows.requires_grad_(), table))


@settings(max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=3, max_size=3), st.integers(0, 2)
)
def test_exchange_brings_each_rank_its_rows(sizes: list[list[int]], dropped: int) -> None:
    """sizes[i][j] rows go from rank i to rank j; later rows stay at home and get no gradient."""
    table = torch.tensor(sizes)

    def run(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        send, receive = table[rank], table[:, rank]
        rows = torch.full((int(send.sum()) + dropped, 2), float(rank)) + torch.arange(2)
        rows.requires_grad_()
        there = c10d.wait_tensor(ops.exchange(rows, send, receive, "data"))
        home = c10d.wait_tensor(ops.exchange(there * 10, receive, send, "data", rows.shape[0]))
        home.backward(torch.ones_like(home))
        assert rows.grad is not None
        return there.detach(), home.detach(), rows.grad

    for rank, (there, home, gradient) in enumerate(run_ranks(Mesh(3), run)):
        senders = torch.arange(3.0).repeat_interleave(table[:, rank])
        assert torch.equal(there[:, 0], senders)
        sent = int(table[rank].sum())
        assert torch.equal(home[:sent, 1], torch.full((sent,), 10.0 * (rank + 1)))
        assert not home[sent:].any()
        assert torch.equal(gradient, torch.cat([torch.full((sent, 2), 10.0), torch.zeros(dropped, 2)]))


def transposed(forward: Callable[[Tensor], Tensor], xs: list[Tensor], mesh: Mesh) -> tuple[float, float]:
    """<A x, y> and <x, Aᵀ y>, summed over ranks, for random y."""

    def run(rank: int) -> tuple[float, float]:
        x = xs[rank].clone().requires_grad_()
        out = forward(x)
        y = torch.randn(out.shape, generator=torch.Generator().manual_seed(rank), dtype=out.dtype)
        (back,) = torch.autograd.grad(out, x, y)
        return float((out.detach() * y).sum()), float((x.detach() * back).sum())

    pairs = run_ranks(mesh, run)
    return sum(a for a, _ in pairs), sum(b for _, b in pairs)


@pytest.mark.parametrize("sizes", [(2, 0, 3), (0, 0, 0), (1, 1, 1)])
def test_gather_and_scatter_rows_are_each_other_s_transpose(sizes: tuple[int, ...]) -> None:
    held = torch.tensor(sizes)
    xs = [torch.randn(n + 1, 2, dtype=torch.float64) for n in sizes]  # one row more than is gathered
    left, right = transposed(lambda x: ops.gather_rows(x, held, "data"), xs, Mesh(3))
    assert left == pytest.approx(right, rel=1e-12)
    xs = [torch.randn(sum(sizes), 2, dtype=torch.float64) for _ in sizes]
    left, right = transposed(lambda x: ops.scatter_rows(x, held, "data"), xs, Mesh(3))
    assert left == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 9])
def test_shares_are_stretches_and_come_together_again(num_rows: int) -> None:
    whole = torch.randn(num_rows, 2, dtype=torch.float64)
    parts = run_ranks(Mesh(1, 3), lambda rank: ops.share(whole, "tensor"))
    for part, needed in zip(parts, whole.tensor_split(3), strict=True):
        assert torch.equal(part, needed)
    for together in run_ranks(Mesh(1, 3), lambda rank: ops.unshare(parts[rank], num_rows, "tensor")):
        assert torch.equal(together, whole)
    left, right = transposed(
        lambda x: ops.share(x, "tensor"), [whole * (r + 1) for r in range(3)], Mesh(1, 3)
    )
    assert left == pytest.approx(right, rel=1e-12)
    left, right = transposed(lambda y: ops.unshare(y, num_rows, "tensor"), parts, Mesh(1, 3))
    assert left == pytest.approx(right, rel=1e-12)


def test_sizes_that_do_not_fit_and_axes_that_are_not_there_are_said() -> None:
    rows, two = torch.zeros(1, 2), torch.tensor([1, 1])
    with pytest.raises(OperatorError, match="2 of 1 rows to send"):
        ops.exchange(rows, two, two, "data")
    with pytest.raises(OperatorError, match="no process group of the name 'nowhere'"):
        ops.share(rows, "nowhere")
