"""How the processes of a job find each other: the default process group, from torchrun's environment.

The store of an elastic job outlives its processes, so a rank that was started again finds there what its
predecessors wrote: addresses that nobody listens at any more. Therefore the ranks agree first on who is there
(`_gather`), and everything that follows stands under a name that only they know.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moec.errors import MeshError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

#: How long ranks wait for each other at the start.
PATIENCE = timedelta(minutes=5)
_PAUSE = 0.02


def meet(timeout: timedelta | None = None, device: str = "cpu", patience: timedelta = PATIENCE) -> Store:
    """Make the default process group from the environment: gloo, and NCCL too when `device` is CUDA.

    Gives a store that the ranks of this start of the job share. `timeout` bounds every collective, `patience`
    the meeting. Raises `MeshError` for an incomplete environment, a port in use, or ranks that do not come.
    """
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        found = f"no process group, and no {', '.join(missing)} in the environment"
        command = "torchrun --nproc-per-node N -m moec …"
        raise MeshError("mesh", found, "processes that can find each other", command)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        found_store, rank, world = next(iter(rendezvous("env://", timeout=patience)))
        store = _gather(found_store, rank, world, patience)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except (dist.DistError, ValueError, RuntimeError) as error:
        raise _no_meeting(error) from error
    return PrefixStore("moec", store)


def _gather(store: Store, rank: int, world: int, patience: timedelta) -> Store:
    """A part of `store` that belongs to the `world` processes that are there now.

    Each writes a name of its own. Rank 0 reads the names aloud until each rank has answered to what it read,
    its own name in it; then it says that this is the list.
    """
    name = uuid.uuid4().hex
    store.set(f"moec/name/{rank}", name)
    deadline = time.monotonic() + patience.total_seconds()
    while time.monotonic() < deadline:
        final = _preside(store, world) if rank == 0 else _answer(store, rank, name)
        if final is not None:
            return PrefixStore(hashlib.sha256(json.dumps(final).encode()).hexdigest(), store)
        time.sleep(_PAUSE)
    raise _absent(store, rank, world, patience)


def _preside(store: Store, world: int) -> list[str] | None:
    names = [_read(store, f"moec/name/{rank}") for rank in range(world)]
    if not all(names):
        return None
    aloud = json.dumps(names)
    store.set("moec/aloud", aloud)
    if any(_read(store, f"moec/answer/{rank}") != aloud for rank in range(1, world)):
        return None
    store.set("moec/final", aloud)
    return names


def _answer(store: Store, rank: int, name: str) -> list[str] | None:
    aloud = _read(store, "moec/aloud")
    if aloud and json.loads(aloud)[rank : rank + 1] == [name]:
        store.set(f"moec/answer/{rank}", aloud)
    final: list[str] = json.loads(_read(store, "moec/final") or "[]")
    return final if final[rank : rank + 1] == [name] else None


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _absent(store: Store, rank: int, world: int, patience: timedelta) -> MeshError:
    aloud = _read(store, "moec/aloud")
    here = [other for other in range(1, world) if aloud and _read(store, f"moec/answer/{other}") == aloud]
    absent = [other for other in range(world) if other not in (*here, rank)]
    found = f"after {patience.total_seconds():g} s, no word from rank {', '.join(map(str, absent))}"
    needed = f"all {world} ranks (WORLD_SIZE), started together"
    return MeshError(f"rank {rank}, rendezvous at {_address()}", found, needed)


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _no_meeting(error: Exception) -> MeshError:
    """What went wrong when the ranks were to find each other, in a user's words."""
    reason = str(error).strip().partition("\n")[0]
    where = f"rank {os.environ['RANK']}, rendezvous at {_address()}"
    if "EADDRINUSE" in str(error):
        free = "torchrun --master-port 0, or another one"
        return MeshError(where, "the port is in use", "a free port", free)
    return MeshError(where, reason, "rank 0 listening there, and every other rank on its way to it")
