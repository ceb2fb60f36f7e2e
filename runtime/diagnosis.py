"""Which rank the others wait for: read off what every rank says of itself.

A rank that has entered fewer collectives along an axis than another of its group keeps that one waiting. The
one to name is kept waiting by nobody: all the others stand behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from moec.errors import RankError
from moec.ir.mesh import Mesh
from moec.runtime.verdict import name_ranks


@dataclass(frozen=True)
class Post:
    """What a rank says of itself: `counts` of entries along each axis, the `recent` ones in words (number →
    sentence), the `last` one of all, the line `at` which it is, and whether it is `done`."""

    counts: Mapping[str, int] = field(default_factory=dict)
    recent: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    last: str = ""
    last_axis: str = ""
    at: str = ""
    beat: int = 0
    done: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What all ranks of a job on `mesh` said last, and which of them were `silent` when asked again."""

    mesh: Mesh
    posts: Mapping[int, Post]
    silent: Collection[int]
    seconds: float

    def error(self) -> RankError:
        """The error that names the rank all wait for, and what for."""
        culprits = self.culprits()
        if not culprits:
            return self._nobody()
        culprit = culprits[0]
        waiters = [rank for rank in self.posts if self._waits(rank, culprit)]
        waiting = f", in which {_plural(waiters, self.mesh.world)}" if waiters else ""
        more = f"; nor did {name_ranks(culprits[1:], 0)} move" if culprits[1:] else ""
        return RankError(
            f"rank {culprit}",
            f"it did not enter {self._missed(culprit, waiters)}{waiting}{more}",
            f"every rank in it within {self.seconds:g} s ([parallel] timeout)",
            self._last_seen(culprit),
        )

    def culprits(self) -> list[int]:
        """The ranks that keep others waiting and wait for nobody; silent ones first."""
        late = {s for s in self._ranks for r in self.posts if self._waits(r, s)}
        found = [s for s in late if s in self.silent or not any(self._waits(s, r) for r in self._ranks)]
        found = found or list(self.silent)
        return sorted(found, key=lambda rank: (rank not in self.silent, rank))

    @property
    def _ranks(self) -> range:
        return range(self.mesh.world)

    def _waits(self, rank: int, other: int) -> bool:
        return rank != other and bool(self._lags(rank, other))

    def _lags(self, rank: int, other: int) -> list[str]:
        """The axes along which `other` has entered less than `rank`, of whose group it is."""
        ours, theirs = self.posts.get(rank, Post()).counts, self.posts.get(other, Post()).counts
        behind = [axis for axis, count in ours.items() if theirs.get(axis, 0) < count]
        return [axis for axis in behind if other in self.mesh.group(axis, rank)]

    def _missed(self, culprit: int, waiters: list[int]) -> str:
        """The collective that the culprit keeps others waiting in.

        A silent rank may have done more since it spoke last, so there it is the one that is waited in now.
        """
        if not waiters:
            return "a collective of the trainer"
        post = self.posts[waiters[0]]
        lags = self._lags(waiters[0], culprit)
        if culprit in self.silent and post.last_axis in lags:
            return post.last
        recent = post.recent.get(lags[0], {})
        next_ = self.posts.get(culprit, Post()).counts.get(lags[0], 0) + 1
        return recent.get(next_) or next(iter(recent.values()), f"a collective over {lags[0]}")

    def _last_seen(self, culprit: int) -> str:
        post = self.posts.get(culprit)
        if post is None:
            return "it never said where it is"
        seen = f"it was last seen in {post.last}" if post.last else "it was last seen before any exchange"
        where = f", at {post.at}" if post.at else ""
        if post.done:
            return f"{seen}, and has ended since"
        return f"{seen}{where}; it {'does not answer' if culprit in self.silent else 'is still there'}"

    def _nobody(self) -> RankError:
        some = min(self.posts, default=0)
        where = self.posts[some].last if some in self.posts else "a collective"
        return RankError(
            "every rank",
            f"no progress since {where or 'the start'}",
            f"a step forward within {self.seconds:g} s ([parallel] timeout)",
            f"rank {some} is at {self.posts[some].at}" if some in self.posts else "",
        )


def _plural(ranks: list[int], world: int) -> str:
    return f"{name_ranks(ranks, world)} wait{'s' if len(ranks) == 1 else ''}"
