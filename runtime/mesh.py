"""Process groups for the axes of a mesh, in a job of processes.

    with connected(mesh) as rank:
        agree("plan", digest)
        local = program.partition(rank)

Inside, a group of `torch.distributed` stands under the name of each axis of more than one rank, where the
collectives of a partitioned graph (`_c10d_functional.all_reduce(x, "sum", "tensor")`) look for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # gives the collectives of a graph their gradients
from torch._C import _distributed_c10d as c10d

from moec.errors import MeshError, OperatorError
from moec.ir.mesh import WORLD, Mesh
from moec.runtime.ops.groups import group_of
from moec.runtime.rendezvous import meet
from moec.runtime.turns import ranks_named


@contextmanager
def connected(mesh: Mesh, *, timeout: timedelta | None = None, device: str = "cpu") -> Iterator[int]:
    """The rank of this process among those of `mesh`, with a group for every axis until the end.

    The default process group is taken as it is, or made from the environment that torchrun sets: gloo, and
    NCCL for CUDA tensors when `device` is one (its device is chosen by LOCAL_RANK). `timeout` bounds every
    collective (torch's default: 30 minutes). A mesh of one rank needs no process group at all.

    Raises `MeshError` when there is no rendezvous, its port is taken, nobody answers, or the number of ranks
    is not the mesh's.
    """
    if _is_registered(WORLD):
        raise MeshError("mesh", "connected ranks already", "one mesh at a time", "the end of the other one")
    if mesh.world == 1 and not dist.is_initialized() and "RANK" not in os.environ:
        yield 0
        return
    started = not dist.is_initialized()
    if started:
        _check_world(mesh, int(os.environ.get("WORLD_SIZE", mesh.world)))
        meet(timeout, device)
    try:
        _check_world(mesh, dist.get_world_size())
        with _made_groups(mesh, dist.get_rank(), timeout) as groups, registered(groups):
            yield dist.get_rank()
    finally:
        if started:
            dist.destroy_process_group()


@contextmanager
def registered(
    groups: Mapping[str, dist.ProcessGroup], current: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """`groups` under their names, where graphs look for them; names are free again afterwards.

    `current` is asked at the end: whether the table that the names stand in is still the same.
    """
    _require_gradients()
    for name, group in groups.items():  # torch's table refers weakly to them; `groups` keeps them
        c10d._register_process_group(name, group)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if current():
            for name in groups:
                c10d._unregister_process_group(name)  # type: ignore[arg-type]


def _require_gradients() -> None:
    """Raise `MeshError` where torch would run collectives forward and silently give them no gradient."""
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"):
        operator = f"_c10d_functional::{name}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "Autograd"):
            found = f"torch {torch.__version__}, in which {operator} has no gradient"
            raise MeshError("mesh", found, "a torch whose functional collectives have one", "torch 2.13")


def _check_world(mesh: Mesh, world: int) -> None:
    if world != mesh.world:
        divisors = [size for size in range(1, world + 1) if world % size == 0]
        tensor = max(size for size in divisors if mesh.tensor % size == 0)
        fit = f"with {world} ranks: data {world // tensor} × tensor {tensor}"
        sizes = ", ".join(map(str, divisors))
        raise MeshError(
            "mesh", f"{world} ranks", f"{mesh}", f"{fit}; tensor, expert and slice can be {sizes} here"
        )


@contextmanager
def _made_groups(mesh: Mesh, rank: int, timeout: timedelta | None) -> Iterator[dict[str, dist.ProcessGroup]]:
    """A group for each axis of more than one rank; axes of the same ranks share one.

    Every rank goes through every group in the same order, members or not, as torch asks for.
    """
    whole = dist.group.WORLD
    assert whole is not None
    made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {tuple(mesh.groups(WORLD)): whole}
    groups = {}
    try:
        for axis in [axis for axis, size in mesh.axes().items() if size > 1]:
            ranks = tuple(mesh.groups(axis))
            if ranks not in made:
                every = [dist.new_group(list(one), timeout=timeout, group_desc=axis) for one in ranks]
                made[ranks] = every[ranks.index(mesh.group(axis, rank))]
            groups[axis] = made[ranks]
        yield groups
    finally:
        for group in made.values():
            if group is not whole:
                dist.destroy_process_group(group)


def agree(name: str, value: str) -> None:
    """Raise `MeshError` on every rank, naming the ranks that differ, unless all have the same `value`.

    Called by every rank, inside `connected` or `run_ranks`; a process that is alone agrees with itself. It
    is meant for the start of a job, where ranks that hold different plans would hang later on.
    """
    if not _is_registered(WORLD) and (not dist.is_initialized() or dist.get_world_size() == 1):
        return
    mine = hashlib.sha256(value.encode()).digest()
    theirs = gathered(mine)
    others = [rank for rank, digest in enumerate(theirs) if digest != theirs[0]]
    if others:
        lengths = [int.from_bytes(row, "big") for row in gathered(len(value.encode()).to_bytes(8, "big"))]
        texts = [row.rstrip(b"\0").decode() for row in gathered(value.encode().ljust(max(lengths), b"\0"))]
        found = f"{ranks_named(others)} with another {name}: {_short(texts[others[0]])}"
        raise MeshError(name, found, f"that of rank 0 on every rank: {_short(texts[0])}")


def _is_registered(axis: str) -> bool:
    try:
        group_of(axis)
    except OperatorError:
        return False
    return True


def gathered(row: bytes) -> list[bytes]:
    """The rows of all ranks, equally long, in their order; called by every rank, as `agree` is."""
    group = group_of(WORLD)
    device = "cpu" if torch.device("cpu") in group._device_types or not dist.is_initialized() else "cuda"
    mine = torch.frombuffer(bytearray(row), dtype=torch.uint8).to(device)
    gather = torch.ops._c10d_functional.all_gather_into_tensor(mine, group.size(), WORLD)
    rows = torch.ops._c10d_functional.wait_tensor(gather).view(group.size(), -1).cpu()
    return [bytes(line.tolist()) for line in rows]


def _short(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"
