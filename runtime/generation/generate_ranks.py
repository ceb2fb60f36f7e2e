"""Texts written by all ranks of a mesh: prompts dealt out, rows written side by side, results everywhere.

Data rank d writes the d-th stretch of the rows, as it sees the d-th stretch of a batch in training; the ranks
of a tensor group write the same ones. A row draws its tokens by the seed and its number among all rows, so
the texts are those of one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from moec.errors import DataError, MeshError
from moec.ir.mesh import DATA, TENSOR, WORLD, Mesh
from moec.runtime.generation.decoding import Decoding
from moec.runtime.generation.generate import Generation
from moec.runtime.generation.lockstep import Lockstep
from moec.runtime.generation.request import Request
from moec.runtime.generation.rows import Ended, Event
from moec.runtime.mesh import agree, gathered
from moec.runtime.ops.groups import group_of
from moec.runtime.turns import ranks_named

ENDS: tuple[Ended | None, ...] = (None, "stop", "length", "cancelled")


class RankGeneration(Generation):
    """The events of the rows that one rank writes; to be asked for to the end on every rank, or closed.

    `dealt`: every rank was given the whole request and writes its stretch of it; `result()`, at the end, is
    that of the whole, the same on every rank. Otherwise the request is this rank's own, which may be of no
    rows, and so is the result. Events and `cancel` count rows as the request does.

    Raises `MeshError` at once when ranks were given other requests, and on the way when the ranks of a
    tensor group do not write the same.
    """

    def __init__(self, decoding: Decoding, request: Request, mesh: Mesh, rank: int, *, dealt: bool) -> None:
        group_of(WORLD)  # an error that says what is missing, before any work
        if dealt:
            agree("request", described(request))
        self.mesh, self.dealt, self.finished = mesh, dealt, False
        self.lockstep = Lockstep(decoding, mesh)
        count = len(request.prompts.rows)
        super().__init__(self.lockstep, request, own_rows(count, mesh, rank) if dealt else range(count))

    def __next__(self) -> Event:
        """The next token of a row written here; `StopIteration` when the rows of all ranks have ended."""
        try:
            return super().__next__()
        except StopIteration:
            if not self.finished:
                self._finish()
            raise

    def _finish(self) -> None:
        self.finished = True
        self.lockstep.finish()
        if self.dealt:
            told = [(ENDS.index(end), *new) for end, new in zip(self.ended, self.new, strict=True)]
            texts = joined([told[number] for number in self.numbers], len(told), self.mesh)
            self.ended = [ENDS[text[0]] for text in texts]
            self.new = [text[1:] for text in texts]

    def close(self) -> None:
        """End the rows that are written here, and go along until those of all ranks have ended."""
        super().close()
        for _ in self:
            pass

    def result(self) -> Tensor | list[Tensor]:
        """As `generate` returns it, once all rows have ended."""
        if not self.finished:
            found, needed = "rows that have not ended", "all events asked for, or close()"
            raise DataError("generation.result", found, needed)
        return super().result()


def own_rows(count: int, mesh: Mesh, rank: int) -> range:
    """The rows, of `count`, that `rank` writes: stretches as `torch.tensor_split` cuts them."""
    size, longer = divmod(count, mesh.data)
    place = mesh.coordinate(DATA, rank)
    first = place * size + min(place, longer)
    return range(first, first + size + (place < longer))


def joined(texts: Sequence[Sequence[int]], count: int, mesh: Mesh) -> list[list[int]]:
    """The texts of all `count` rows, from those of `own_rows` on each rank; called by every rank.

    Raises `MeshError`, naming the ranks, where those of a tensor group do not have the same.
    """
    told = _gathered_texts(texts)
    for group in mesh.groups(TENSOR):
        others = [rank for rank in group if told[rank] != told[group[0]]]
        if others:
            found = f"{ranks_named(others)} with other texts than rank {group[0]}"
            raise MeshError("generate", found, "the same texts on all ranks of a tensor group")
    whole: list[list[int]] = [[] for _ in range(count)]
    for rank in mesh.group(DATA, 0):
        for number, text in zip(own_rows(count, mesh, rank), told[rank], strict=True):
            whole[number] = text
    return whole


def _gathered_texts(texts: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """The texts of every rank: each is sent as its length and its tokens, all of them in a row."""
    flat = np.array([number for text in texts for number in (len(text), *text)], dtype=np.int64)
    most = max(int.from_bytes(size, "big") for size in gathered(len(flat).to_bytes(8, "big")))
    if most == 0:
        return [[] for _ in gathered(b"\0")]
    padded = np.zeros(most + 1, dtype=np.int64)
    padded[0], padded[1 : len(flat) + 1] = len(flat), flat
    return [_texts(np.frombuffer(row, dtype=np.int64).tolist()) for row in gathered(padded.tobytes())]


def _texts(numbers: list[int]) -> list[list[int]]:
    found, place, end = [], 1, 1 + numbers[0]
    while place < end:
        found.append(numbers[place + 1 : place + 1 + numbers[place]])
        place += 1 + numbers[place]
    return found


def described(request: Request) -> str:
    """Of a request all that ranks can compare; a function as `stop` is not."""
    limits = {"rows": request.rows, "chunk": request.chunk, "keep": request.keep, "pad": request.pad}
    given = f"{request.max_new_tokens} new tokens, {request.sampling}, stop {request.stop.sequences}"
    return f"{given}, {limits}, prompts {request.prompts.rows}"
