"""Tokens that every rank of an axis holds, dealt out among them, and put together again.

    share(x [T,D], axis) -> [T_i,D]
        this rank's stretch of the tokens, cut as `torch.tensor_split` cuts; nothing is sent
    unshare(y [T_i,D], num_rows, axis) -> [num_rows,D]
        the stretches of all ranks, on all of them (an all_gather of equally long, padded stretches)

This is how parallelism-coordinated communication begins and ends (DeepSpeed-MoE, section 5.3): the ranks of a
tensor group hold the same tokens, each sends its own share, and the answers are gathered inside the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.runtime.ops.groups import axis_rank, axis_size
from moec.runtime.ops.registry import define, demand, differentiate
from moec.runtime.ops.work import Call, Price, Work, price

c10d = torch.ops._c10d_functional


def stretch(num_rows: int, ranks: int, place: int) -> tuple[int, int]:
    """(first row, number of rows) of the stretch at `place`: the first num_rows % ranks are one longer."""
    size, longer = divmod(num_rows, ranks)
    return place * size + min(place, longer), size + (place < longer)


def _own(num_rows: int, axis: str) -> tuple[int, int]:
    return stretch(num_rows, axis_size(axis), axis_rank(axis))


def _check(name: str, x: Tensor) -> None:
    demand(x.dim() == 2, name, f"a tensor with {x.dim()} dimensions", "[T, D]")


def _share(x: Tensor, axis: str) -> Tensor:
    _check("share", x)
    first, count = _own(x.shape[0], axis)
    return x[first : first + count].clone()


def _fake_share(x: Tensor, axis: str) -> Tensor:
    _check("share", x)
    return x.new_empty(torch.library.get_ctx().new_dynamic_size(), x.shape[1])


def _keep_share(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.num_rows, ctx.axis = inputs[0].shape[0], inputs[1]


def _share_back(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    first, count = _own(ctx.num_rows, ctx.axis)
    return F.pad(grad_TD, (0, 0, first, ctx.num_rows - first - count)), None


def _unshare(y: Tensor, num_rows: int, axis: str) -> Tensor:
    _check("unshare", y)
    ranks = axis_size(axis)
    longest = -(-num_rows // ranks)
    padded = F.pad(y, (0, 0, 0, longest - y.shape[0]))
    all_RTD = c10d.wait_tensor(c10d.all_gather_into_tensor(padded.contiguous(), ranks, axis))
    return _without_padding(all_RTD.view(ranks, longest, y.shape[1]), num_rows)


def _without_padding(all_RTD: Tensor, num_rows: int) -> Tensor:
    ranks = all_RTD.shape[0]
    if num_rows % ranks == 0:
        return all_RTD.reshape(num_rows, all_RTD.shape[2])
    return torch.cat([all_RTD[i, : stretch(num_rows, ranks, i)[1]] for i in range(ranks)])


def _fake_unshare(y: Tensor, num_rows: int, axis: str) -> Tensor:
    _check("unshare", y)
    return y.new_empty(num_rows, y.shape[1])


def _keep_unshare(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.num_rows, ctx.axis = inputs


def _unshare_back(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.moec.sum_share(grad_TD, ctx.axis), None, None


def _sum_share(x: Tensor, axis: str) -> Tensor:
    """This rank's stretch of the sum of `x` over the ranks: what `unshare` is transposed."""
    ranks, num_rows = axis_size(axis), x.shape[0]
    longest = -(-num_rows // ranks)
    parts = [x[first : first + count] for first, count in (stretch(num_rows, ranks, i) for i in range(ranks))]
    padded = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[0])) for part in parts])
    own = c10d.wait_tensor(c10d.reduce_scatter_tensor(padded, "sum", ranks, axis))
    return own[: _own(num_rows, axis)[1]].clone()


define("share(Tensor x, str axis) -> Tensor", _share, _fake_share)
define("unshare(Tensor y, SymInt num_rows, str axis) -> Tensor", _unshare, _fake_unshare)
define("sum_share(Tensor x, str axis) -> Tensor", _sum_share, _fake_share)
differentiate("share", _keep_share, _share_back)
differentiate("unshare", _keep_unshare, _unshare_back)


def _price(call: Call) -> Price:
    """This rank's part is copied; backward puts it among zeros."""
    own = call.result_bytes()
    forward = Work((), own, own)
    return Price(forward, Work((), own, call.bytes("x"))) if call.needs_grad("x") else Price(forward)


price("share", _price)
