"""The group of ranks behind the name of a mesh axis.

Collectives in a graph name an axis (`"expert_4"`); the runtime has registered a process group under that
name (`moec.runtime.mesh`), or one whose ranks are threads (`moec.runtime.simulated`).
"""

from __future__ import annotations

from typing import cast

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from moec.errors import OperatorError


def group_of(axis: str) -> dist.ProcessGroup:
    """The process group registered under the name of an axis; `OperatorError` when there is none."""
    try:
        return cast(dist.ProcessGroup, c10d._resolve_process_group(axis))  # type: ignore
    except (RuntimeError, ValueError):
        found = f"no process group of the name {axis!r}"
        needed = "the groups of the program's mesh"
        raise OperatorError("collective", found, needed, "moec.runtime.mesh.connected(mesh)") from None


def axis_size(axis: str) -> int:
    """How many ranks the axis has."""
    return group_of(axis).size()


def axis_rank(axis: str) -> int:
    """The place of this rank along the axis."""
    return group_of(axis).rank()
