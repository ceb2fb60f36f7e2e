"""Run a function on real ranks: processes of this machine with gloo between them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from moec.ir.mesh import Mesh
from moec.runtime.mesh import connected

# Processes are forked off one that has torch in memory already: a fresh interpreter takes seconds for it.
multiprocessing.set_forkserver_preload(["tests.runtime.ranks"])


def run_processes(mesh: Mesh, function: Callable[[int], Any]) -> list[Any]:
    """`function(rank)` of every rank of `mesh`, a process each; `function` is one of a module, and its
    results are tensors, or numbers and strings, in lists and dicts."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = (mesh, function, free_port(), directory)
        mp.start_processes(_process, arguments, nprocs=mesh.world, start_method="forkserver")
        return [torch.load(Path(directory, f"{rank}.pt")) for rank in range(mesh.world)]


def free_port() -> int:
    """A port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def set_rendezvous(rank: int, world: int, port: int) -> None:
    """The environment that torchrun would set."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _process(rank: int, mesh: Mesh, function: Callable[[int], Any], port: int, directory: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    set_rendezvous(rank, mesh.world, port)
    with connected(mesh):
        torch.save(function(rank), Path(directory, f"{rank}.pt"))
