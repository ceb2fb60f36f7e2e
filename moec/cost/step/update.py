"""What follows the gradients once a step, as `moec.runtime.optimizer` does it."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from moec.cost.rank.weights import Group
from moec.cost.step.written import Written, sending
from moec.cost.symbols import symbol
from moec.ir.mesh import WORLD, Mesh
from moec.runtime.ops.sent import all_gather_cost, reduce_scatter_cost
from moec.runtime.ops.work import Work

_GATHER, _SCATTER = "_c10d_functional::all_gather_into_tensor", "_c10d_functional::reduce_scatter_tensor"
_WAIT = "_c10d_functional::wait_tensor"


def write_update(written: Written, groups: Sequence[Group], mesh: Mesh, *, terms: int, clips: bool) -> None:
    """Add the operations of the optimizer: the loss told to all (`terms` numbers), sums of gradients, their
    norm, clipping where it `clips`, AdamW, and the weights put together again."""
    if mesh.world > 1:
        written.add_sum("loss", WORLD, terms, torch.float64, ())
    dealt = [group for group in groups if group.is_dealt]
    started = [_reduce(written, group) for group in dealt]
    arrived = [_wait(written, group, start) for group, start in zip(dealt, started, strict=True)]
    last = _norm(written, groups, mesh, arrived, clips)
    for group in groups:
        last = _adamw(written, group, last)
    for group in dealt:
        _join(written, group, last)


def _reduce(written: Written, group: Group) -> int:
    """Gradients laid end to end, on their way to the ranks that update them."""
    work = Work((), group.bytes, group.flat + group.bytes, 1 + len(group.weights))
    sent = reduce_scatter_cost(symbol(group.axis), group.flat)
    sends = (sending(group.axis, "reduce_scatter_tensor", sent),)
    return written.add(f"reduce {group.name}", _SCATTER, group.dtype, work, sends=sends)


def _wait(written: Written, group: Group, start: int) -> int:
    return written.add(f"wait {group.name}", _WAIT, group.dtype, after=(start,), started=start)


def _norm(written: Written, groups: Sequence[Group], mesh: Mesh, after: Sequence[int], clips: bool) -> int:
    """The norm of the whole gradient; gradients scaled down to what is allowed."""
    dtype = groups[0].dtype
    read, count = sympy.Add(*(group.stretch for group in groups)), sum(group.updated for group in groups)
    last = written.add(
        "norm", "aten::linalg_vector_norm", dtype, Work((), read, 8 * count, count), after=after
    )
    if mesh.world > 1:
        last = written.add_sum("norm of all", WORLD, 1, torch.float64, (last,))
    if clips:
        last = written.add("clip", "aten::mul", dtype, Work((), read, read, count), after=(last,))
    return last


def _adamw(written: Written, group: Group, after: int) -> int:
    """Weights, gradients and both averages are read, all but the gradients are written."""
    work = Work((), 4 * group.stretch, 3 * group.stretch)
    return written.add(f"adamw {group.name}", "aten::_fused_adamw_", group.dtype, work, after=(after,))


def _join(written: Written, group: Group, after: int) -> int:
    """The stretches of all ranks, gathered and copied to where the weights are."""
    sent = all_gather_cost(symbol(group.axis), group.stretch)
    sends = (sending(group.axis, "all_gather_into_tensor", sent),)
    work = Work((), group.stretch, group.flat)
    start = written.add(f"gather {group.name}", _GATHER, group.dtype, work, sends=sends, after=(after,))
    last = _wait(written, group, start)
    work = Work((), group.flat, group.flat)
    return written.add(f"join {group.name}", "aten::copy_", group.dtype, work, after=(last,))
