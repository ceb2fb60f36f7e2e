"""Which block of a graph is which block of the graph after it, and which entry of theirs is which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from moec.ir.alignment import Alignment
from moec.ir.identity import identity_of
from moec.view.stills import Entry, Frame, Still
from moec.view.timeline import Status


@dataclass(frozen=True)
class Pair:
    """One node of a union: its place before and after (None where it has none), its status, what it was
    made from (by places before), and the pass that fused it."""

    before: int | None
    after: int | None
    status: Status
    made_from: tuple[int, ...] = ()
    fused_by: str = ""


@dataclass(frozen=True)
class Union:
    """Two stills drawn as one; either may be missing. `face`: unions with the same are alike."""

    before: Still | None
    after: Still | None
    pairs: tuple[Pair, ...]
    boxes: tuple[tuple[int | None, int | None, Status], ...]

    @property
    def face(self) -> Hashable:
        """What makes it what it is."""
        faces = tuple(still.face if still is not None else None for still in (self.before, self.after))
        return faces, self.pairs, self.boxes

    @property
    def changed(self) -> bool:
        """Whether a line or a region is not what it was, or lies elsewhere; what crosses the border does not
        count."""
        lines = any(pair.status != "kept" or self._placed_anew(pair) for pair in self.line_pairs())
        return lines or any(status != "kept" for _, _, status in self.boxes)

    def _placed_anew(self, pair: Pair) -> bool:
        """Whether a line that was kept gives another value now, on other ranks, or of other weights."""
        assert self.before is not None
        assert self.after is not None
        assert pair.before is not None
        assert pair.after is not None
        old, new = self.before.entries[pair.before].facts, self.after.entries[pair.after].facts
        return old.said != new.said

    def line_pairs(self) -> list[Pair]:
        """The pairs of lines, without what crosses the border."""
        return [pair for pair in self.pairs if entry_of(self, pair).kind == "line"]


def entry_of(union: Union, pair: Pair) -> Entry:
    """The entry of a pair: as it is after, or else as it was."""
    still, place = (union.after, pair.after) if pair.after is not None else (union.before, pair.before)
    assert still is not None
    assert place is not None
    return still.entries[place]


class Pairing:
    """The unions of two frames, by what `aligned` says of their nodes; None before: all is new.

    `fused`: identities of fused nodes → the pass that made them.
    """

    def __init__(
        self, before: Frame | None, after: Frame, aligned: Alignment | None, fused: Mapping[str, str]
    ) -> None:
        self.before, self.after, self.aligned, self.fused = before, after, aligned, fused
        self._block_before = {} if before is None else _blocks(before)
        self._moved_blocks = self._paired_blocks()

    def unions(self) -> list[Union]:
        """One for every block of either frame, in running order, what is gone behind what stood before it."""
        old = {} if self.before is None else self.before.stills
        ordered = [self._union(old.get(self._moved_blocks.get(key, "")), still) for key, still in
                   self.after.stills.items()]  # fmt: skip
        gone = set(old) - set(self._moved_blocks.values())
        keys = list(old)
        for key in (key for key in keys if key in gone):
            behind = keys[keys.index(key) - 1] if keys.index(key) else None
            place = next((n + 1 for n, u in enumerate(ordered) if u.before and u.before.key == behind), 0)
            ordered.insert(place, self._union(old[key], None))
        return ordered

    def _paired_blocks(self) -> dict[str, str]:
        """Key after → key before: blocks that share the most lines, or else the same key."""
        if self.before is None or self.aligned is None:
            return {}
        shared: Counter[tuple[str, str]] = Counter()
        after = _blocks(self.after)
        for identity, key in after.items():
            if identity in self.aligned.kept and identity in self._block_before:
                shared[key, self._block_before[identity]] += 1
        found: dict[str, str] = {}
        by_size = sorted(shared, key=lambda pair: (-shared[pair], pair[0] != pair[1]))
        for new, old in [*by_size, *((key, key) for key in self.after.stills if key in self.before.stills)]:
            if new not in found and old not in found.values():
                found[new] = old
        return found

    def _union(self, before: Still | None, after: Still | None) -> Union:
        old = _by_identity(before, self.before)
        pairs: list[Pair] = []
        taken: set[int] = set()
        for place, entry in enumerate(after.entries if after else ()):
            pair = self._pair(place, entry, old, taken)
            taken |= {pair.before} if pair.before is not None else set()
            pairs.append(pair)
        for place, entry in enumerate(before.entries if before else ()):
            if place not in taken:
                _insert(pairs, Pair(place, None, self._status_of_gone(entry)))
        return Union(before, after, tuple(pairs), self._boxes(before, after))

    def _pair(self, place: int, entry: Entry, old: dict[tuple[str, str], int], taken: set[int]) -> Pair:
        """What became an entry of the still after."""
        identity = identity_of(entry.node)
        made_from = self._ancestors(identity)
        if entry.kind != "line":
            known = (old.get((entry.kind, one)) for one in (identity, *made_from))
            found = next((one for one in known if one is not None and one not in taken), None)
            return Pair(found, place, "created" if found is None else "kept")
        if self.aligned is None or identity not in self.aligned.kept:
            above = (old.get(("line", one)) for one in made_from)
            sources = tuple(one for one in above if one is not None)
            return Pair(None, place, "created", sources, self.fused.get(identity, ""))
        found = old.get(("line", identity))
        status: Status = "moved" if found is None else self._status(identity)
        return Pair(found, place, status, (), self.fused.get(identity, ""))

    def _status(self, identity: str) -> Status:
        assert self.aligned is not None
        if identity in self.aligned.moved:
            return "moved"
        return "rewired" if identity in self.aligned.rewired else "kept"

    def _status_of_gone(self, entry: Entry) -> Status:
        """Of an entry that has no place in the still after: it moved to another block, or it is gone."""
        kept = self.aligned is not None and identity_of(entry.node) in self.aligned.kept
        return "moved" if kept and entry.kind == "line" else "removed"

    def _ancestors(self, identity: str) -> tuple[str, ...]:
        return () if self.aligned is None else tuple(self.aligned.ancestors.get(identity, ()))

    def _boxes(
        self, before: Still | None, after: Still | None
    ) -> tuple[tuple[int | None, int | None, Status], ...]:
        old = {identity_of(box.call): place for place, box in enumerate(before.boxes if before else ())}
        found: list[tuple[int | None, int | None, Status]] = []
        for place, box in enumerate(after.boxes if after else ()):
            was = old.pop(identity_of(box.call), None)
            found.append((was, place, "created" if was is None else "kept"))
        return (*found, *((place, None, "removed") for place in old.values()))


def _blocks(frame: Frame) -> dict[str, str]:
    """Identity of each line → key of its block."""
    return {
        identity_of(entry.node): key
        for key, still in frame.stills.items()
        for entry in still.entries
        if entry.kind == "line"
    }


def _by_identity(still: Still | None, frame: Frame | None) -> dict[tuple[str, str], int]:
    entries = still.entries if still is not None and frame is not None else ()
    return {(entry.kind, identity_of(entry.node)): place for place, entry in enumerate(entries)}


def _insert(pairs: list[Pair], gone: Pair) -> None:
    """Put what is gone behind what it stood behind."""
    assert gone.before is not None
    stood = {pair.before: place for place, pair in enumerate(pairs) if pair.before is not None}
    place = next((stood[n] + 1 for n in range(gone.before - 1, -1, -1) if n in stood), 0)
    pairs.insert(place, gone)
