"""This rank and the others of its job: sums, verdicts and errors that all of them share.

One process is a job of one rank: `ALONE`, for which nothing here communicates. Collectives go by the names of
mesh axes, as those of a partitioned graph do, so they work for processes and for simulated ranks alike.
Everything that communicates must be called by every rank, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moec import errors
from moec.errors import MoecError, TrainError
from moec.ir.mesh import DATA, WORLD, Mesh
from moec.runtime.data import Batch
from moec.runtime.trainable import LocalTrainable, Trainable, device_of

_collectives = torch.ops._c10d_functional


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of the job on `mesh`; what it sends lies on `device`."""

    mesh: Mesh = field(default_factory=Mesh)
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.mesh.world

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes records and shows progress."""
        return self.rank == 0

    @property
    def place_in_data(self) -> int:
        """The place along the data axis: ranks of one tensor group, which see the same tokens, share it."""
        return self.mesh.coordinate(DATA, self.rank)

    def stretch(self, batch: Batch) -> Batch:
        """The sequences of a global batch (two i64 `[B, S]`) that this rank sees, cut as `tensor_split`."""
        tokens, targets = (side.tensor_split(self.mesh.data)[self.place_in_data] for side in batch)
        return tokens, targets

    def sums(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars by name, each summed over all ranks (in fp64); every rank has the same names."""
        if self.world == 1 or not values:
            return dict(values)
        stacked = torch.stack([value.detach().double() for value in values.values()])
        return dict(zip(values, self._reduced(stacked, "sum").unbind(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank."""
        if self.world == 1:
            return flag
        return bool(self._reduced(torch.tensor([int(flag)], device=self.device), "max"))

    def gather(self, record: Any) -> list[Any]:
        """What every rank handed in, in the order of ranks, as JSON gives it back."""
        data = json.dumps(record, sort_keys=True).encode()
        if self.world == 1:
            return [json.loads(data)]
        longest = int(self._reduced(torch.tensor([len(data)], device=self.device), "max"))
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8).to(self.device)
        gathered = _collectives.all_gather_into_tensor(padded, self.world, WORLD)
        rows = _collectives.wait_tensor(gathered).view(self.world, longest).cpu()
        return [json.loads(bytes(row.tolist())) for row in rows]

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error inside, on any rank, is raised on all of them, so that none is left waiting for the rest.

        Nothing inside may communicate. An error that is not moec's own comes to the other ranks as a
        `TrainError` that names the rank.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        told = self.gather(_told(failure))
        if failure is not None:
            raise failure
        for rank, words in enumerate(told):
            if words is not None:
                raise _error_of(rank, words)

    def require_alike(self, facts: Mapping[str, str]) -> None:
        """Raise `TrainError` on every rank, naming the ones that differ, unless all have the same `facts`."""
        told = self.gather(dict(facts))
        for name, mine in told[0].items():
            others = [rank for rank, row in enumerate(told) if row.get(name) != mine]
            if others:
                found = f"another {name} on rank {', '.join(map(str, others))}: {told[others[0]].get(name)}"
                raise TrainError(name, found, f"that of rank 0 everywhere: {mine}")

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        return _collectives.wait_tensor(_collectives.all_reduce(values.to(self.device), how, WORLD))


ALONE = Ranks()


def ranks_of(program: Trainable) -> Ranks:
    """The job that `program` is a part of: that of its mesh, or `ALONE` for a whole program."""
    if isinstance(program, LocalTrainable) and program.layout is not None:
        return Ranks(program.layout.mesh, program.rank, device_of(program))
    return Ranks(device=device_of(program))


def _told(error: Exception | None) -> list[str] | None:
    if error is None:
        return None
    if isinstance(error, MoecError):
        return [type(error).__name__, error.where, error.found, error.needed, error.nearest]
    return ["", f"{type(error).__name__}: {error}"]


def _error_of(rank: int, words: list[str]) -> MoecError:
    kind, *rest = words
    known = getattr(errors, kind, None) if kind else None
    return known(*rest) if known else TrainError(f"rank {rank}", rest[0], "no error")
