"""A program without its weights: every parameter and buffer on `meta`, all else as it is.

What a rank remembers of the whole program: its text, its stages, where its weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from .program import Program

P = TypeVar("P", bound=Program)


def hollow(program: P) -> P:
    """`program` over weights on `meta`, snapshots included; it shares the graphs, which nobody changes in
    place, and tied weights stay tied."""
    table: dict[int, Any] = {}
    records = program._records()
    records["snapshots"] = {name: _hollow(graph, table) for name, graph in program.stages.items()}
    return type(program)(_hollow(program.graph, table), **records).train(program.training)


def _hollow(module: fx.GraphModule, table: dict[int, Any]) -> fx.GraphModule:
    """A shell of the same class around the same graphs; `table`: id of a module or weight → its stand-in."""
    if id(module) not in table:
        table[id(module)] = _shell(module, table)
    made = table[id(module)]
    assert isinstance(made, fx.GraphModule)
    return made


def _shell(module: nn.Module, table: dict[int, Any]) -> nn.Module:
    made = object.__new__(module.__class__)  # torch.fx would make a class of its own, without a forward
    made.__dict__ = dict(module.__dict__)
    made._parameters = {name: _hollow_weight(value, table) for name, value in module._parameters.items()}
    made._buffers = {name: _hollow_weight(value, table) for name, value in module._buffers.items()}
    made._modules = {name: child and _shell(child, table) for name, child in module._modules.items()}
    return made


def _hollow_weight(value: Any, table: dict[int, Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if id(value) not in table:
        empty = torch.empty_like(value.detach(), device="meta")
        parameter = isinstance(value, nn.Parameter)
        table[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad) if parameter else empty
    return table[id(value)]


def with_weights(module: fx.GraphModule, weights: Mapping[int, Tensor]) -> fx.GraphModule:
    """A shell around the same graphs over other weights: `weights` says which, by the id of the present one;
    any other becomes one on `meta`."""
    return _hollow(module, dict(weights))
