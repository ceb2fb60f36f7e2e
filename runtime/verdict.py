"""The one error that a job of many ranks tells its user.

Every rank that fails brings its error here; the first one speaks, for all that failed alike, and the others
end in silence with the same status. An error comes before the end of its process, so ranks that fail because
another one has gone find that the word was taken.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

#: Seconds in which ranks that fail alike have to say so to be named together.
PATIENCE = 3.0


class Verdict:
    """What went wrong in the job whose ranks share `store`."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store, self._rank, self._world = PrefixStore("moec/verdict", store), rank, world

    def claim(self, text: str, status: int) -> str | None:
        """Bring an error and the exit status it asks for; gives the ranks it is true of, None for silence.

        The ranks read "rank 3", "ranks 1 and 3", or "every rank".
        """
        try:
            self._store.set(f"of/{self._rank}", text)
            if self._store.add("claims", 1) > 1:
                return None
            self._store.set("status", json.dumps(status))
            return self._said_alike(text)
        except dist.DistError:  # the store went with the rank that held it
            return name_ranks([self._rank], self._world)

    def status(self, otherwise: int) -> int:
        """The exit status that the first error asked for."""
        try:
            return int(json.loads(self._store.get("status"))) if self._store.check(["claims"]) else otherwise
        except dist.DistError:
            return otherwise

    def _said_alike(self, text: str) -> str:
        deadline = time.monotonic() + PATIENCE
        ranks = range(self._world)
        while not all(said := [self._said(rank) for rank in ranks]) and time.monotonic() < deadline:
            time.sleep(PATIENCE / 20)
        return name_ranks([rank for rank in ranks if said[rank] == text], self._world)

    def _said(self, rank: int) -> str:
        key = f"of/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""


def name_ranks(ranks: Sequence[int], world: int) -> str:
    """ "rank 3", "ranks 1 and 3", "ranks 0, 1 and 2", or "every rank"."""
    if len(ranks) == world > 1:
        return "every rank"
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}"
