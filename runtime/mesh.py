"""Process groups for the axes of a mesh, in a job of processes.

    with connected(mesh) as rank:
        agree("plan", digest)
        local = program.partition(rank)

Inside, a group of `torch.distributed` stands under the name of each axis of more than one rank, where the
collectives of a partitioned graph (`_c10d_functional.all_reduce(x, "sum", "tensor")`) look for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # gives the collectives of a graph their gradients
from torch._C import _distributed_c10d as c10d
from torch.distributed.distributed_c10d import GroupName

from moec.errors import MeshError
from moec.ir.mesh import WORLD, Mesh

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def connected(mesh: Mesh, *, timeout: timedelta | None = None, device: str = "cpu") -> Iterator[int]:
    """The rank of this process among those of `mesh`, with a group for every axis until the end.

    The default process group is taken as it is, or made from the environment that torchrun sets: gloo, and
    NCCL for CUDA tensors when `device` is one (its device is chosen by LOCAL_RANK). `timeout` bounds every
    collective (torch's default: 30 minutes). A mesh of one rank needs no process group at all.

    Raises `MeshError` when there is no rendezvous, its port is taken, nobody answers, or the number of ranks
    is not the mesh's.
    """
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
    for name, group in groups.items():  # torch's table refers weakly to them; `groups` keeps them
        c10d._register_process_group(GroupName(name), group)
    try:
        yield
    finally:
        if current():
            for name in groups:
                c10d._unregister_process_group(GroupName(name))


def meet(timeout: timedelta | None = None, device: str = "cpu") -> None:
    """Make the default process group from the environment; `MeshError` as for `connected`."""
    missing = [name for name in _RENDEZVOUS if name not in os.environ]
    if missing:
        found = f"no process group, and no {', '.join(missing)} in the environment"
        command = "torchrun --nproc-per-node N -m moec …"
        raise MeshError("mesh", found, "processes that can find each other", command)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
    except (dist.DistError, ValueError) as error:
        raise _no_meeting(error) from error


def _no_meeting(error: Exception) -> MeshError:
    """What went wrong when the ranks were to find each other, in a user's words."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    reason = str(error).strip().partition("\n")[0]
    where = f"rank {os.environ['RANK']}, rendezvous at {address}:{port}"
    if "EADDRINUSE" in str(error):
        return MeshError(
            where, "the port is in use", "a free port", "torchrun --master-port 0, or another one"
        )
    return MeshError(where, reason, "rank 0 listening there, and every other rank on its way to it")


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
