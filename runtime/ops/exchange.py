"""Rows that travel between the ranks of a mesh axis, as many as the data says.

    exchange(rows [N,D], send [R], receive [R], axis, num_rows=-1) -> [M,D]
        the first send[0] rows go to the first rank of `axis`, the next send[1] to the second, …; what comes
        back is ordered by sender, receive[i] rows from rank i. `num_rows` says how many rows the result has
        (rows after the received ones are zero); -1: as many as arrive. Not awaited: `wait_tensor` is.
    regroup(rows [N,D], counts [A,B]) -> [N,D]
        rows that lie in blocks (a, b) of counts[a, b] rows, a slowest, now with b slowest; later rows stay.
    gather_rows(rows [M,D], sizes [R], axis) -> [sum of sizes, D]
        the rows of all ranks of `axis`, in its order: the first sizes[own place] of those here, and so on
    scatter_rows(rows [sum of sizes, D], sizes [R], axis, num_rows=-1) -> [M,D]
        the sum over the ranks of what each holds for this one: the transpose of `gather_rows`; rows after
        these, up to `num_rows`, are zero

The library's all_to_all_single wants its sizes as numbers in the graph; here they are tensors, so a graph
has one unknown size an exchange and not one a rank. Underneath is `_c10d_functional.all_to_all_single`, which
waits for nobody without rows: a rank that sends and receives nothing takes part with empty tensors.
Each backward is the exact transpose.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.runtime.ops.groups import axis_rank
from moec.runtime.ops.registry import define, demand, differentiate

c10d = torch.ops._c10d_functional


def _check(name: str, rows: Tensor, *sizes: Tensor) -> None:
    demand(rows.dim() == 2, name, f"rows with {rows.dim()} dimensions", "rows [N, D]")
    for size in sizes:
        fits = size.dim() == 1 and size.dtype == torch.int64
        demand(fits, name, f"sizes {size.dtype} {list(size.shape)}", "sizes i64 [R], one a rank")


def _unknown_rows(rows: Tensor) -> Tensor:
    return rows.new_empty(torch.library.get_ctx().new_dynamic_size(), rows.shape[1])


def _exchange(rows: Tensor, send: Tensor, receive: Tensor, axis: str, num_rows: int = -1) -> Tensor:
    _check("exchange", rows, send, receive)
    sent, received = send.tolist(), receive.tolist()
    fits = sum(sent) <= rows.shape[0] and (num_rows < 0 or sum(received) <= num_rows)
    demand(fits, "exchange", f"{sum(sent)} of {rows.shape[0]} rows to send", "sizes that fit the rows")
    out: Tensor = c10d.all_to_all_single(rows[: sum(sent)].contiguous(), received, sent, axis)
    missing = num_rows - out.shape[0] if num_rows >= 0 else 0
    if missing:
        return torch.cat([c10d.wait_tensor(out), out.new_zeros(missing, out.shape[1])])
    return out


def _fake_exchange(rows: Tensor, send: Tensor, receive: Tensor, axis: str, num_rows: int = -1) -> Tensor:
    _check("exchange", rows, send, receive)
    known = not isinstance(num_rows, int) or num_rows >= 0
    return rows.new_empty(num_rows, rows.shape[1]) if known else _unknown_rows(rows)


def _keep_exchange(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, send, receive, ctx.axis, *_ = inputs
    ctx.save_for_backward(send, receive)
    ctx.num_rows = rows.shape[0]


def _exchange_back(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
    send, receive = ctx.saved_tensors
    back = torch.ops.moec.exchange(grad_MD, receive, send, ctx.axis, ctx.num_rows)
    return c10d.wait_tensor(back), None, None, None, None


def block_order(counts_AB: Tensor, num_rows: int) -> Tensor:
    """Where each row of the regrouped layout comes from: i64 [N]."""
    lengths = counts_AB.reshape(-1)
    starts = (lengths.cumsum(0) - lengths).view_as(counts_AB).t().reshape(-1)
    lengths = counts_AB.t().reshape(-1)
    shift = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    order = torch.arange(num_rows, device=counts_AB.device)
    order[: shift.shape[0]] += shift
    return order


def _regroup(rows: Tensor, counts: Tensor) -> Tensor:
    demand(counts.dim() == 2, "regroup", f"counts with {counts.dim()} dimensions", "counts i64 [A, B]")
    return rows.index_select(0, block_order(counts, rows.shape[0]))


def _fake_regroup(rows: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _keep_regroup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _regroup_back(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.moec.regroup(grad_ND, ctx.saved_tensors[0].t()), None


def _gather(rows: Tensor, sizes: Tensor, axis: str) -> Tensor:
    _check("gather_rows", rows, sizes)
    counts = sizes.tolist()
    own = counts[axis_rank(axis)]
    demand(own <= rows.shape[0], "gather_rows", f"{rows.shape[0]} rows", f"{own}, as the sizes say")
    sent = rows[:own].repeat(len(counts), 1)
    return c10d.wait_tensor(c10d.all_to_all_single(sent, counts, [own] * len(counts), axis))


def _fake_gather(rows: Tensor, sizes: Tensor, axis: str) -> Tensor:
    _check("gather_rows", rows, sizes)
    return _unknown_rows(rows)


def _keep_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, sizes, ctx.axis = inputs
    ctx.num_rows = rows.shape[0]
    ctx.save_for_backward(sizes)


def _gather_back(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.moec.scatter_rows(grad_ND, ctx.saved_tensors[0], ctx.axis, ctx.num_rows)
    return back, None, None


def _scatter(rows: Tensor, sizes: Tensor, axis: str, num_rows: int = -1) -> Tensor:
    _check("scatter_rows", rows, sizes)
    counts = sizes.tolist()
    own = counts[axis_rank(axis)]
    got = c10d.all_to_all_single(rows.contiguous(), [own] * len(counts), counts, axis)
    sums = c10d.wait_tensor(got).view(len(counts), own, rows.shape[1]).sum(0)
    return sums if num_rows < 0 else F.pad(sums, (0, 0, 0, num_rows - own))


def _fake_scatter(rows: Tensor, sizes: Tensor, axis: str, num_rows: int = -1) -> Tensor:
    _check("scatter_rows", rows, sizes)
    known = not isinstance(num_rows, int) or num_rows >= 0
    return rows.new_empty(num_rows, rows.shape[1]) if known else _unknown_rows(rows)


def _keep_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, sizes, ctx.axis, *_ = inputs
    ctx.save_for_backward(sizes)


def _scatter_back(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.moec.gather_rows(grad_MD.contiguous(), ctx.saved_tensors[0], ctx.axis)
    return back, None, None, None


define(
    "exchange(Tensor rows, Tensor send, Tensor receive, str axis, SymInt num_rows=-1) -> Tensor",
    _exchange,
    _fake_exchange,
)
define("regroup(Tensor rows, Tensor counts) -> Tensor", _regroup, _fake_regroup)
define("gather_rows(Tensor rows, Tensor sizes, str axis) -> Tensor", _gather, _fake_gather)
define(
    "scatter_rows(Tensor rows, Tensor sizes, str axis, SymInt num_rows=-1) -> Tensor", _scatter, _fake_scatter
)
differentiate("exchange", _keep_exchange, _exchange_back)
differentiate("regroup", _keep_regroup, _regroup_back)
differentiate("gather_rows", _keep_gather, _gather_back)
differentiate("scatter_rows", _keep_scatter, _scatter_back)
