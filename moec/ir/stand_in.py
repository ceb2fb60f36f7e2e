"""A program on `meta` with stand-ins for its weights: what has to look at numbers of positions can.

Only the weights that positions are made of get numbers (any will do: what is derived from them is shapes, and
masks, which come of indices); every other one is a single number seen everywhere, so that nothing is
allocated.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import torch
from torch import Tensor, nn

from .graphs import named_weights
from .hollow import hollow, with_weights
from .program import Program
from .region import regions
from .retarget import on_device

P = TypeVar("P", bound=Program)


def on_meta(program: Program) -> bool:
    """Whether the weights of a program are shapes without numbers."""
    return any(value.is_meta for _, value in named_weights(program.graph))


def with_stand_ins(program: P) -> P:
    """`program` over weights on the CPU that take no memory; tied ones stay tied. It is not to be run."""
    inside = {
        id(value)
        for region in regions(program.graph, "positions").values()
        for _, value in named_weights(region)
    }
    made = {id(v): _stand_in(v, id(v) in inside) for _, v in named_weights(program.graph) if v.is_meta}
    graph = with_weights(program.graph, made)
    on_device(graph, torch.device("cpu"))
    return type(program)(graph, **program._records()).train(program.training)


def without_stand_ins(program: P) -> P:
    """The same over weights on `meta` again."""
    made = hollow(program)
    on_device(made.graph, torch.device("meta"))
    return made


def _stand_in(value: Tensor, numbers: bool) -> Tensor:
    if numbers and value.is_floating_point():
        made = _numbers(tuple(value.shape), value.dtype)
    else:
        made = torch.zeros((), dtype=value.dtype).expand(value.shape)
    return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made


@functools.lru_cache(maxsize=2)
def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Some numbers, which nobody writes to; a search asks for the same ones many times."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
