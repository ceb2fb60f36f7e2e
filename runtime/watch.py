"""A rank that hangs ends the job, with words that say which rank and where.

Each rank has a thread that posts to the job's store what its rank entered last (see `trail.py`). When its own
rank has entered nothing for the time limit, it reads what the others posted (`diagnosis.py`) and ends the
process with an error that names the rank all wait for, the axis, the operation and the layer.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from moec.errors import RankError
from moec.ir.mesh import Mesh
from moec.runtime.diagnosis import Diagnosis, Post
from moec.runtime.trail import Trail

#: Posts in the time limit, and the longest time between two, in seconds.
BEATS, LONGEST = 12, 5.0

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_MOEC = str(Path(__file__).parents[1])


class Watch:
    """`with Watch(…):` around training, on every rank of the job on `mesh` whose ranks share `store`.

    `end` is called, in the thread of the watch, when the job hangs; it must end the process. The limit covers
    everything between two collectives: an evaluation's first batch, the writing of a checkpoint.
    """

    def __init__(
        self,
        trail: Trail,
        mesh: Mesh,
        rank: int,
        store: Store,
        limit: float,
        end: Callable[[RankError], None],
    ) -> None:
        self._trail, self._mesh, self._rank = trail, mesh, rank
        # A connection of its own: the training thread may hold the other one while it waits.
        self._store = PrefixStore("moec/watch", store.clone())  # type: ignore[attr-defined]
        self._limit, self._end = limit, end
        self._pause = min(limit / BEATS, LONGEST)
        self._axes = [axis for axis, size in mesh.axes().items() if size > 1]
        self._watched = threading.get_ident()
        self._beat = 0
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join(self._pause)

    def _run(self) -> None:
        seen, since = -1, time.monotonic()
        while not self._leaving.wait(self._pause if self._beat else 0):
            try:
                self._post()
                if self._trail.length != seen:
                    seen, since = self._trail.length, time.monotonic()
                elif time.monotonic() - since > self._limit - 4 * self._pause:
                    self._diagnose(seen)
                    since = time.monotonic()
            except dist.DistError as error:
                if not self._leaving.is_set():
                    self._end(self._without_store(error))
        self._say_goodbye()

    def _post(self, done: bool = False) -> None:
        self._beat += 1
        trail = self._trail
        last = trail.last
        post = Post(
            {axis: trail.count(axis) for axis in self._axes},
            {axis: {entry.number: str(entry) for entry in trail.recent(axis)} for axis in self._axes},
            str(last) if last else "",
            last.axis if last else "",
            self._line(),
            self._beat,
            done,
        )
        self._store.set(str(self._rank), json.dumps(asdict(post)))

    def _say_goodbye(self) -> None:
        try:
            self._post(done=True)
        except dist.DistError:
            return  # the rank that held the store has left before

    def _diagnose(self, seen: int) -> None:
        """Two looks, some posts apart, show who is silent; then the end, unless all went on meanwhile."""
        first = self._posts()
        for _ in range(3):
            if self._leaving.wait(self._pause):
                return
            self._post()
        posts = self._posts()
        silent = [
            rank
            for rank in range(self._mesh.world)
            if rank not in posts
            or (not posts[rank].done and rank in first and posts[rank].beat == first[rank].beat)
        ]
        if self._trail.length == seen:
            self._end(Diagnosis(self._mesh, posts, silent, self._limit).error())

    def _posts(self) -> dict[int, Post]:
        keys = [str(rank) for rank in range(self._mesh.world) if self._store.check([str(rank)])]
        return {
            int(key): _read_post(text) for key, text in zip(keys, self._store.multi_get(keys), strict=True)
        }

    def _line(self) -> str:
        """The line that the watched thread is at, in moec's or the user's own code."""
        frame = sys._current_frames().get(self._watched)
        while frame is not None and _is_foreign(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is None:
            return ""
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"

    def _without_store(self, error: Exception) -> RankError:
        found = f"the job's store does not answer ({str(error).splitlines()[0]})"
        last = f"rank {self._rank} was last seen in {self._trail.last}" if self._trail.last else ""
        return RankError(f"rank {self._rank}", found, "the rank or the launcher that holds the store", last)


def _is_foreign(file: str) -> bool:
    return file.startswith(("<", *_LIBRARIES)) and not file.startswith(_MOEC)


def _read_post(text: bytes) -> Post:
    record = json.loads(text)
    record["recent"] = {
        axis: {int(number): words for number, words in entries.items()}
        for axis, entries in record["recent"].items()
    }
    return Post(**record)


def lost_connection(error: Exception, trail: Trail, rank: int) -> RankError:
    """The error of a rank whose collective failed: mostly, another rank has gone."""
    where = f" in {trail.last}" if trail.last else ""
    return RankError(
        f"rank {rank}",
        f"the connection to another rank broke{where}: {str(error).strip().splitlines()[0]}",
        "all ranks of the job, until its end",
        "the job goes on from its newest checkpoint when it is started again",
    )


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed, rather than the program: torch has no one class for that."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
