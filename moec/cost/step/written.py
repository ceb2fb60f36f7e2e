"""Operations that stand in no graph, written down one after the other: what a loss or an optimizer does."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from moec.cost.operation import Operation, Sending
from moec.cost.symbols import symbol
from moec.runtime.ops.sent import Sent, all_reduce_cost
from moec.runtime.ops.work import NOTHING, Amount, Work


class Written:
    """`operations`: those of a graph, and after them all that is written, in the region `place`, of the kind
    `kind`."""

    def __init__(self, operations: Sequence[Operation], place: str, kind: str = "") -> None:
        self.operations, self.place, self.kind = list(operations), place, kind or place

    def add(
        self,
        name: str,
        operator: str,
        dtype: torch.dtype,
        forward: Work = NOTHING,
        backward: Work = NOTHING,
        *,
        sends: tuple[Sending, ...] = (),
        sends_back: tuple[Sending, ...] = (),
        saved: Amount = 0,
        after: Sequence[int] = (),
        started: int | None = None,
    ) -> int:
        """Write one; gives its index. It is called `loss.cast`, `optimizer.clip`."""
        spelled = str(dtype).removeprefix("torch.")
        self.operations.append(
            Operation(
                f"{self.place}.{name}", self.place, None, operator, self.kind, spelled, forward, backward,
                sends, sends_back, saved, 0, tuple(sorted(after)), started,
            )
        )  # fmt: skip
        return len(self.operations) - 1

    def add_sum(self, name: str, axis: str, numbers: int, dtype: torch.dtype, after: Sequence[int]) -> int:
        """A few numbers added up over the ranks of `axis`, at once awaited."""
        num_bytes = sympy.Integer(dtype.itemsize * numbers)
        sends = (sending(axis, "all_reduce", all_reduce_cost(symbol(axis), num_bytes)),)
        work = Work((), num_bytes, num_bytes)
        return self.add(name, "_c10d_functional::all_reduce", dtype, work, sends=sends, after=after)


def sending(axis: str, operator: str, sent: Sent) -> Sending:
    """What is sent along `axis`, under the name that `moec.runtime.traffic` has for it."""
    return Sending(axis, operator, sent.messages, sent.bytes, sent.calls)
