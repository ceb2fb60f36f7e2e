"""`moec::part`: the part of a tensor that belongs to this rank.

    part(x, dim, blocks, ranks, axis) -> x with dim cut to sum(blocks) / ranks

Each of `blocks` (lengths that add up to the dim, each a multiple of `ranks`) is cut into `ranks` stretches;
the rank at place i of `axis` gets the i-th of each. Nothing is sent. Its transpose puts zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moec.runtime.ops.groups import axis_rank
from moec.runtime.ops.registry import define, demand, differentiate
from moec.runtime.ops.work import Call, Price, Work, price


def _check(x: Tensor, dim: int, blocks: Sequence[int], ranks: int) -> None:
    fits = sum(blocks) == x.shape[dim]
    demand(fits, "part", f"blocks {list(blocks)} of a dim of {x.shape[dim]}", "blocks that add up to the dim")
    even = not any(length % ranks for length in blocks)
    demand(even, "part", f"blocks {list(blocks)} for {ranks} ranks", f"multiples of {ranks}")


def _stretches(blocks: Sequence[int], ranks: int, place: int) -> list[tuple[int, int]]:
    """(start, length) of the stretch of every block that the rank at `place` gets."""
    found, start = [], 0
    for length in blocks:
        found.append((start + place * (length // ranks), length // ranks))
        start += length
    return found


def _part(x: Tensor, dim: int, blocks: Sequence[int], ranks: int, axis: str) -> Tensor:
    _check(x, dim, blocks, ranks)
    own = _stretches(blocks, ranks, axis_rank(axis))
    return torch.cat([x.narrow(dim, start, length) for start, length in own], dim)


def _fake(x: Tensor, dim: int, blocks: Sequence[int], ranks: int, axis: str) -> Tensor:
    _check(x, dim, blocks, ranks)
    sizes = list(x.shape)
    sizes[dim] = sum(blocks) // ranks
    return x.new_empty(sizes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.cut = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.moec.part_back(grad, *ctx.cut), None, None, None, None


def _part_back(grad: Tensor, dim: int, blocks: Sequence[int], ranks: int, axis: str) -> Tensor:
    """Zeros but for this rank's part, which is `grad`: what `part` is transposed."""
    whole, taken = _fake_back(grad, dim, blocks, ranks, axis).zero_(), 0
    for start, length in _stretches(blocks, ranks, axis_rank(axis)):
        whole.narrow(dim, start, length).copy_(grad.narrow(dim, taken, length))
        taken += length
    return whole


def _fake_back(grad: Tensor, dim: int, blocks: Sequence[int], ranks: int, axis: str) -> Tensor:
    sizes = list(grad.shape)
    sizes[dim] = sum(blocks)
    return grad.new_empty(sizes)


define("part(Tensor x, int dim, int[] blocks, int ranks, str axis) -> Tensor", _part, _fake)
define("part_back(Tensor grad, int dim, int[] blocks, int ranks, str axis) -> Tensor", _part_back, _fake_back)
differentiate("part", _setup, _backward)


def _price(call: Call) -> Price:
    """This rank's part is copied; backward puts it among zeros."""
    own = call.result_bytes()
    forward = Work((), own, own)
    return Price(forward, Work((), own, call.bytes("x"))) if call.needs_grad("x") else Price(forward)


price("part", _price)
