"""`moec::remember`: write what is new into a cache, in place.

    remember(cache [R, …, L, …], new [R, …, n, …], at [B, n], dim) -> ()
        cache[r, …, at[b, i], …] = new[r, …, i, …], positions at `dim`; R is B times the rows of dim 0 that
        belong to each row of the batch

It returns nothing: what reads the cache afterwards reads what was written. Not differentiable; decoding keeps
no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.runtime.ops.registry import define, demand
from moec.runtime.ops.work import Call, Price, Work, price


def check_remember(cache: Tensor, new: Tensor, at: Tensor, dim: int) -> None:
    """Raise an `OperatorError` for arguments that `moec::remember` cannot mean anything by."""
    name = "remember"
    demand(0 < dim < cache.dim(), name, f"positions at dim {dim}", f"a dim from 1 to {cache.dim() - 1}")
    demand(at.dim() == 2, name, f"positions {list(at.shape)}", "positions [B, n]")
    demand(new.dim() == cache.dim(), name, f"{new.dim()} dims", f"{cache.dim()}, as the cache has")
    demand(new.dtype == cache.dtype, name, f"values of {new.dtype}", f"{cache.dtype}, as in the cache")


def _remember(cache: Tensor, new: Tensor, at: Tensor, dim: int) -> None:
    check_remember(cache, new, at, dim)
    if at.shape[0] == 1:  # one row of the batch: every row of the cache has the same positions
        cache.index_copy_(dim, at[0], new)
        return
    rows = torch.arange(cache.shape[0], device=cache.device).unsqueeze(1)
    each = cache.shape[0] // max(at.shape[0], 1)
    where = at if each == 1 else at.repeat_interleave(each, 0)
    cache.transpose(1, dim)[rows, where] = new.transpose(1, dim)


def _fake(cache: Tensor, new: Tensor, at: Tensor, dim: int) -> None:
    check_remember(cache, new, at, dim)


define("remember(Tensor(a!) cache, Tensor new, Tensor at, int dim) -> ()", _remember, _fake)


def _price(call: Call) -> Price:
    """What is new is written; the rest of the cache is not touched."""
    return Price(Work((), call.bytes("new") + call.bytes("at"), call.bytes("new")))


price("remember", _price)
