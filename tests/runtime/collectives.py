"""A small graph with every collective in it, written by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.runtime.ops.groups import axis_rank, axis_size

C10D = torch.ops._c10d_functional
wait = C10D.wait_tensor


def every_collective(axis: str, rank: int, x: Tensor) -> dict[str, Tensor]:
    """All of them along `axis`, forward and backward, from x [4, 3], which differs from rank to rank.

    Rank i sends (i + j) % 3 rows to rank j, so some send nothing to some.
    """
    ranks, place = axis_size(axis), axis_rank(axis)
    x = x.clone().requires_grad_()
    total = wait(C10D.all_reduce(x * 2, "sum", axis))
    everyone = wait(C10D.all_gather_into_tensor(total * x, ranks, axis))
    scattered = wait(C10D.reduce_scatter_tensor(everyone * everyone, "sum", ranks, axis))
    sizes = [(place + other) % 3 for other in range(ranks)]
    rows = (x[:1] * x).sum(0).expand(sum(sizes), 3)
    moved = wait(C10D.all_to_all_single(rows.contiguous(), sizes, sizes, axis))
    (scattered.sum() + (moved * moved).sum()).backward()
    assert x.grad is not None
    return {
        "total": total.detach(),
        "everyone": everyone.detach(),
        "scattered": scattered.detach(),
        "moved": moved.detach(),
        "grad": x.grad,
        "first": wait(C10D.broadcast(x.detach(), 0, axis)),
        "largest": wait(C10D.all_reduce(x.detach(), "max", axis)),
    }
