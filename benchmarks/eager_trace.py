"""Plain PyTorch, priced operator by operator as an eager host starts it. Nothing runs: tensors are on `meta`.

trace = EagerTrace("moe_1", 1)
with trace:
    layer(x)
trace.operations                # one `Operation` for every call below autograd
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moec.cost import Operation, Sending
from moec.cost.reading.kinds import kind_of
from moec.runtime.ops.work import Product, Work

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_FREE = ("aten::empty", "aten::empty_strided", "aten::_unsafe_view")


class EagerTrace(TorchDispatchMode):
    """Notes every operator that is called inside, with the bytes it reads and writes and its products.

    `weights`: what is to be counted as parameters; operators depend on the one before, as on one stream.
    """

    def __init__(self, region: str, layer: int | None = None, weights: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.region, self.layer = region, layer
        self.operations: list[Operation] = []
        self._weights = {id(weight) for weight in weights}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self._note(func, operands, [v for v in tree_leaves(result) if isinstance(v, Tensor)])
        return result

    def send(self, axis: str, ranks: int, operator: str, sent: float, messages: int) -> None:
        """Note a collective among `ranks` ranks of `axis`, in which this one sends `sent` bytes."""
        if ranks > 1:
            sending = Sending(axis, operator, messages, sent)
            self._add(f"{operator}_{axis}", f"c10d::{operator}", "collective", "float16", Work(), (sending,))

    def _note(self, func: OpOverload, operands: list[Tensor], results: list[Tensor]) -> None:
        name = func._schema.name
        dtype = str(next((o.dtype for o in operands if o.is_floating_point()), torch.int64))
        work, weights = Work(calls=0), 0
        if not _is_view(func) and name not in _FREE:
            read, written = (sum(map(_bytes, values)) for values in (operands, results))
            work = Work(_products(name, operands), read, written)
            weights = sum(_bytes(operand) for operand in operands if self._is_weight(operand))
        self._add(name.partition("::")[2], name, _kind(name), dtype.removeprefix("torch."), work, (), weights)

    def _is_weight(self, value: Tensor) -> bool:
        return id(value) in self._weights or (value._base is not None and id(value._base) in self._weights)

    def _add(
        self, name: str, operator: str, kind: str, dtype: str, work: Work, sends: Any = (), weights: int = 0
    ) -> None:
        count = len(self.operations)
        after = (count - 1,) if count else ()
        self.operations.append(
            Operation(
                f"{self.region}.{name}_{count}",
                self.region,
                self.layer,
                operator,
                kind,
                dtype,
                work,
                sends=sends,
                weights=weights,
                after=after,
            )
        )


def _kind(name: str) -> str:
    if name in _PRODUCTS:
        return "product"
    return kind_of(name.replace("native_", ""))


def _is_view(func: OpOverload) -> bool:
    """Whether results share memory with an operand and nothing is written."""
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _bytes(value: Tensor) -> int:
    """Of what lies in memory: a dimension that is expanded lies there once."""
    sizes = [size for size, stride in zip(value.shape, value.stride(), strict=True) if stride or size == 0]
    return value.itemsize * math.prod(sizes)


def _products(name: str, operands: list[Tensor]) -> tuple[Product, ...]:
    """The matrix product of a call: the last two operands, behind one that is added."""
    if name not in _PRODUCTS:
        return ()
    left, right = operands[-2:]
    groups = left.shape[0] if left.ndim == 3 else 1
    return (Product(groups * left.shape[-2], right.shape[-1], left.shape[-1], groups),)


def joined(parts: Sequence[Sequence[Operation]]) -> tuple[Operation, ...]:
    """One stream of operations after another."""
    made: list[Operation] = []
    for part in parts:
        begin = len(made)
        for one in part:
            after = tuple(begin + index for index in one.after) or ((begin - 1,) if begin else ())
            made.append(replace(one, after=after))
    return tuple(made)
