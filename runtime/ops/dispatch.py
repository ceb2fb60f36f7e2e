"""`moec::dispatch`: bring each expert's rows together.

    dispatch(x [T,D], order [N], top_k) -> rows [N,D],  rows[i] = x[order[i] // top_k]

Dropped slots have rows too (the last ones): N never depends on values, so shapes stay symbolic in T alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.runtime.ops.buffers import ROWS
from moec.runtime.ops.registry import define, demand, differentiate
from moec.runtime.ops.work import Call, Price, Work, price


def token_of(order_N: Tensor, top_k: int) -> Tensor:
    """The token [N] that each slot of `order` belongs to."""
    return order_N if top_k == 1 else order_N.div(top_k, rounding_mode="floor")


def invert(order_N: Tensor) -> Tensor:
    """Where each slot stands in `order`: the inverse permutation [N]."""
    places_N = torch.arange(order_N.shape[0], device=order_N.device)
    return torch.empty_like(order_N).scatter(0, order_N, places_N)


def _check(x: Tensor, order: Tensor, top_k: int) -> None:
    demand(x.dim() == 2, "dispatch", f"x with {x.dim()} dimensions", "x [T, D]")
    demand(order.dim() == 1, "dispatch", f"order with {order.dim()} dimensions", "order [T*K]")
    demand(top_k >= 1, "dispatch", f"top_k {top_k}", "top_k >= 1")


def _dispatch(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    _check(x, order, top_k)
    slots, tokens = order.shape[0], x.shape[0]
    demand(slots == tokens * top_k, "dispatch", f"{slots} slots for {tokens} tokens", f"T * {top_k} slots")
    rows = ROWS.empty((slots, x.shape[1]), x.dtype, x.device)
    return torch.index_select(x, 0, token_of(order, top_k), out=rows)


def _fake(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    _check(x, order, top_k)
    return x.new_empty(order.shape[0], x.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.top_k = inputs[2]


def _backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    # Gather and add, not scatter-add: the same order of additions every time, on every device.
    (order_N,) = ctx.saved_tensors
    return sum_rows(grad_ND, order_N, ctx.top_k), None, None


def sum_rows(rows_ND: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """For each token the sum of its rows [T,D]: what `dispatch` is transposed."""
    places_TK = invert(order_N).unflatten(0, (-1, top_k))
    if top_k == 1:
        return rows_ND.index_select(0, places_TK.squeeze(1))
    return F.embedding_bag(places_TK, rows_ND, mode="sum")


define("dispatch(Tensor x, Tensor order, int top_k) -> Tensor", _dispatch, _fake)
differentiate("dispatch", _setup, _backward)


def _price(call: Call) -> Price:
    """A row is read for every slot; backward sums them, a token at a time."""
    rows, order = call.result_bytes(), call.bytes("order")
    forward = Work((), rows + order, rows)
    return Price(forward, Work((), rows + order, call.bytes("x"))) if call.needs_grad("x") else Price(forward)


price("dispatch", _price)
