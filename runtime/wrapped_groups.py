"""The process group of a mesh axis, wrapped: whoever listens hears of all that goes along the axis.

What communicates along an axis (a node of a program, its backward, the optimizer, the trainer) finds its
group by the name of the axis. A wrapped group stands there in its place, tells what it is asked for, and
hands it on: the program does not change, and a compiled one is heard as well. It can be wrapped again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

from moec.runtime.ops.groups import group_of

#: The methods that a group is called by, here by the names that people call them by.
OPERATIONS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "barrier": "barrier",
    "send": "send",
    "recv": "receive",
}

#: Told before a group is asked: the group inside, its axis, the method, and what the method is given.
Heard = Callable[[dist.ProcessGroup, str, str, Sequence[Any]], None]


class WrappedGroup(dist.ProcessGroup):
    """The process group `inner` of an axis, that tells `heard` what it is asked for and hands it on."""

    def __init__(self, axis: str, inner: dist.ProcessGroup, heard: Heard) -> None:
        super().__init__(inner.rank(), inner.size())  # type: ignore[call-arg]
        self.axis, self.inner, self.heard = axis, inner, heard

    def getBackendName(self) -> str:
        """The backend of the group inside."""
        return str(self.inner.name())

    @property
    def _device_types(self) -> list[torch.device]:
        return list(self.inner._device_types)

    @property
    def group_name(self) -> str:  # type: ignore[override]
        """The axis: what the group is registered under."""
        return self.axis


def _telling(method: str) -> Callable[..., Any]:
    @wraps(getattr(dist.ProcessGroup, method))
    def call(self: WrappedGroup, *args: Any, **options: Any) -> Any:
        self.heard(self.inner, self.axis, method, args)
        return getattr(self.inner, method)(*args, **options)

    return call


for _method in OPERATIONS:
    if hasattr(dist.ProcessGroup, _method):  # the names differ between versions of torch
        setattr(WrappedGroup, _method, _telling(_method))


@contextmanager
def wrapped_axes(axes: Iterable[str], heard: Heard) -> Iterator[None]:
    """Tell `heard` all that goes along `axes`, whose groups are registered already, while inside."""
    inner = {axis: group_of(axis) for axis in axes}
    wrapped = {axis: WrappedGroup(axis, group, heard) for axis, group in inner.items()}
    for axis in inner:  # torch's table refers weakly to them; `wrapped` keeps them
        _replace(axis, wrapped[axis])
    try:
        yield
    finally:
        for axis in inner:
            _replace(axis, inner[axis])


def _replace(axis: str, group: dist.ProcessGroup) -> None:
    _unregister_process_group(axis)  # type: ignore[arg-type]
    _register_process_group(axis, group)  # type: ignore[arg-type]
