"""Ranks that write texts step by step together: rows meet in the experts, whoever they belong to.

A step of the program is a step of every rank, since rows travel between them; what a rank reads in it (a
prompt, the next token of some rows, nothing) is its own affair. So a rank that is done goes along without
rows until all are. Before each step the ranks tell each other whether they have anything to read, and a
digest of it: the ranks of a tensor group compute the same rows, and must have chosen the same tokens.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from moec.errors import MeshError
from moec.ir.mesh import TENSOR, Mesh
from moec.runtime.generation.cache import Cache
from moec.runtime.generation.decoding import Decoding
from moec.runtime.mesh import gathered
from moec.runtime.turns import ranks_named

NOTHING = b"done\0"


class Lockstep:
    """The `Decoding` of one rank of `mesh`, whose steps are those of all ranks.

    Every rank calls `finish` when it has no more rows. Inside `connected(mesh)`, or `run_ranks`.
    """

    def __init__(self, decoding: Decoding, mesh: Mesh) -> None:
        self.decoding, self.mesh = decoding, mesh
        self.vocabulary, self.max_positions = decoding.vocabulary, decoding.max_positions
        self.steps = 0

    @property
    def device(self) -> torch.device:
        """As of the decoding inside."""
        return self.decoding.device

    def new_cache(self, rows: int, length: int) -> Cache:
        """As of the decoding inside; only this rank's rows."""
        return self.decoding.new_cache(rows, length)

    def step(self, tokens_Bn: Tensor, past_B: Tensor, wanted_Bm: Tensor, cache: Cache, length: int) -> Tensor:
        """As of the decoding inside, together with a step of every other rank.

        Raises `MeshError` on all ranks when those of a tensor group do not read the same.
        """
        self._meet(_digest(tokens_Bn, past_B))
        return self.decoding.step(tokens_Bn, past_B, wanted_Bm, cache, length)

    def finish(self) -> None:
        """Take part, without rows, in the steps of the others, until all ranks are here."""
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        cache = self.decoding.new_cache(0, 1)
        while self._meet(NOTHING):
            self.decoding.step(none.view(0, 1), none, none.view(0, 1), cache, 1)

    def _meet(self, mine: bytes) -> bool:
        """Tell the others what this rank is about to read; whether any rank has a step to take."""
        self.steps += 1
        told = gathered(mine)
        for group in self.mesh.groups(TENSOR):
            others = [rank for rank in group if told[rank] != told[group[0]]]
            if others:
                raise _other_tokens(group[0], others, self.steps)
        return any(one != NOTHING for one in told)


def _digest(tokens_Bn: Tensor, past_B: Tensor) -> bytes:
    """Of what a step reads, as long as `NOTHING` and never the same."""
    digest = zlib.crc32(repr(tuple(tokens_Bn.shape)).encode())
    for value in (tokens_Bn, past_B):
        digest = zlib.crc32(value.contiguous().cpu().numpy().tobytes(), digest)
    return b"\1" + digest.to_bytes(4, "big")


def _other_tokens(first: int, others: list[int], step: int) -> MeshError:
    found = f"{ranks_named(others)} with other tokens than rank {first}, of the same tensor group"
    needed = "the same prompts, options and cancelled rows on all ranks of a tensor group"
    return MeshError(f"generate, step {step}", found, needed)
