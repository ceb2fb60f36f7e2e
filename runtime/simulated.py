"""All ranks of a mesh in one process: a thread each, with the same graph, groups and collectives.

    logits = run_ranks(mesh, lambda rank: program.partition(rank)(my_tokens[rank]))

Inside `function`, the process groups of the mesh stand under the names of its axes, as they do in a job of
processes (`moec.runtime.mesh`), so `torch.ops._c10d_functional` and `torch.distributed` calls that are given
one of these groups behave as there. Sums are taken in the order of the ranks; with gloo, and three ranks or
more, the order is another and so is the rounding. A collective is over when the call returns.

Ranks take turns (`moec.runtime.turns`), so a run is the same every time, and ranks that do not do the same
collectives get an error that names them, instead of waiting for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch._C import _distributed_c10d as c10d

from moec.errors import MeshError
from moec.ir.mesh import Mesh
from moec.runtime.meetings import Meetings
from moec.runtime.mesh import registered
from moec.runtime.thread_group import ThreadGroup
from moec.runtime.turns import Turns

T = TypeVar("T")
_ONE_AT_A_TIME = threading.Lock()


def run_ranks(mesh: Mesh, function: Callable[[int], T], *, timeout: float = 120.0) -> list[T]:
    """`function(rank)` of every rank of `mesh`, in the order of the ranks.

    Each rank starts with the caller's random state, grad mode, inference mode and CPU autocast, and the
    caller's random state is what it was afterwards. Anything else that torch keeps for a thread (dispatch
    modes, saved-tensor hooks) starts fresh: enter it in `function`.

    The first exception of a rank is raised here, with a note that names the rank; `MeshError` for collectives
    that do not match, for ranks that wait for one another, and for ranks that run longer than `timeout`
    seconds (their thread cannot be ended, and is left behind).
    """
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise MeshError("run_ranks", "another simulation running", "one at a time in a process")
    try:
        turns = Turns(mesh.world)
        meetings = Meetings(turns)
        inherited = _thread_state()

        def body(rank: int) -> T:
            with inherited(), registered(_groups(mesh, rank, meetings), lambda: not turns.over):
                return function(rank)

        c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]
        try:
            return turns.run(body, timeout)
        finally:
            c10d._set_thread_isolation_mode(False)  # type: ignore[attr-defined]
    finally:
        _ONE_AT_A_TIME.release()


def _groups(mesh: Mesh, rank: int, meetings: Meetings) -> dict[str, ThreadGroup]:
    """A group for every axis of more than one rank."""
    axes = [axis for axis, size in mesh.axes().items() if size > 1]
    return {axis: ThreadGroup(axis, mesh.group(axis, rank), rank, meetings) for axis in axes}


def _thread_state() -> Callable[[], AbstractContextManager[None]]:
    """What torch keeps for this thread, as a context for another one.

    Backward of a rank has to run in the thread of the rank, on a GPU too: no threads of autograd's own.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    @contextmanager
    def enter() -> Iterator[None]:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", dtype, enabled=autocast),
            torch.autograd.set_multithreading_enabled(False),
        ):
            yield

    return enter
