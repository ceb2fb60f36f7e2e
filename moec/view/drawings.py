"""A block before and after as one `Drawing`, each distinct one once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from moec.view.overlays import NOTHING, Amounts, Overlays
from moec.view.pairing import Pair, Union
from moec.view.stills import Entry, Frame
from moec.view.templates import variables_of
from moec.view.timeline import Drawing, Node, RegionBox, Side


@dataclass
class Drawings:
    """The drawings of a timeline, by their place; alike unions share one."""

    overlays: Overlays
    drawn: list[Drawing] = field(default_factory=list)
    _places: dict[Hashable, int] = field(default_factory=dict)

    def place(self, union: Union, before: Frame | None, after: Frame) -> int:
        """Where the drawing of `union` stands; made where it is the first of its kind."""
        face = union.face
        if face not in self._places:
            self._places[face] = len(self.drawn)
            self.drawn.append(_Sketch(union, before, after, self.overlays).drawing())
        return self._places[face]


class _Sketch:
    """One union being drawn."""

    def __init__(self, union: Union, before: Frame | None, after: Frame, overlays: Overlays) -> None:
        self.union, self.frames = union, (before, after)
        self.stills = (union.before, union.after)
        self.amounts = tuple(
            overlays.of(frame, still) if frame is not None and still is not None else ()
            for frame, still in zip(self.frames, self.stills, strict=True)
        )
        self.regions = tuple(self._region_places(side) for side in (0, 1))
        ends = [(pair.before, pair.after) for pair in union.pairs]
        self.places = tuple(_places([end[side] for end in ends]) for side in (0, 1))

    def drawing(self) -> Drawing:
        nodes = tuple(self._node(pair) for pair in self.union.pairs)
        return Drawing(nodes, tuple(map(self._box, self.union.boxes)), self._edges())

    def _region_places(self, side: int) -> dict[str, int]:
        """Name of a region on a side → its place among the boxes of the drawing."""
        still = self.stills[side]
        return {
            str(still.boxes[place].call.target): number
            for number, (before, after, _) in enumerate(self.union.boxes)
            if still is not None and (place := (before, after)[side]) is not None
        }

    def _node(self, pair: Pair) -> Node:
        made_from = tuple(self.places[0][place] for place in pair.made_from if place in self.places[0])
        sides = self._side(0, pair.before), self._side(1, pair.after)
        return Node(pair.status, *sides, made_from, pair.fused_by)

    def _side(self, side: int, place: int | None) -> Side | None:
        still, frame = self.stills[side], self.frames[side]
        if place is None or still is None or frame is None:
            return None
        entry = still.entries[place]
        amounts = self.amounts[side][place] if self.amounts[side] else NOTHING
        region = self.regions[side].get(entry.drawn.region) if entry.drawn is not None else None
        return _side_of(entry, frame, amounts, region)

    def _box(self, box: tuple[int | None, int | None, str]) -> RegionBox:
        before, after, status = box
        side = 1 if after is not None else 0
        still, frame = self.stills[side], self.frames[side]
        place = after if after is not None else before
        assert still is not None
        assert frame is not None
        assert place is not None
        found = still.boxes[place]
        return RegionBox(
            found.name, found.kind, found.path, found.source, status, dict(found.settings), found.plan,  # type: ignore[arg-type]
            frame.call_line(found), frame.signature(found),
        )  # fmt: skip

    def _edges(self) -> tuple[tuple[int, int, int], ...]:
        sides: dict[tuple[int, int], set[int]] = {}
        for side in (0, 1):
            for edge in self._edges_of(side):
                sides.setdefault(edge, set()).add(side)
        return tuple((a, b, 0 if len(found) == 2 else 1 + min(found)) for (a, b), found in sides.items())

    def _edges_of(self, side: int) -> list[tuple[int, int]]:
        still, places = self.stills[side], self.places[side]
        entries = still.entries if still is not None else ()
        return [(places[read], places[place]) for place, entry in enumerate(entries) for read in entry.reads]


def _places(of_side: Sequence[int | None]) -> dict[int, int]:
    """Place on a side → place in the drawing."""
    return {place: number for number, place in enumerate(of_side) if place is not None}


def _side_of(entry: Entry, frame: Frame, amounts: Amounts, region: int | None) -> Side:
    facts = entry.facts
    name = _assigned(entry, frame)
    code = name if entry.template is None else code_of(entry, frame)
    return Side(
        name, code, facts.operator, facts.value, facts.path, facts.source, region, facts.placement,
        facts.collective, facts.axis, amounts.flops, amounts.bytes, amounts.text, facts.weights,
    )  # fmt: skip


def _assigned(entry: Entry, frame: Frame) -> str:
    """The variables of a line, as they stand on its left."""
    items = entry.drawn.items if entry.drawn is not None else ()
    if not items:
        return frame.names(entry.node)
    names = [frame.names(item) if item is not None else "_" for item in items]
    return ", ".join(names) + ("," if len(names) == 1 else "")


def code_of(entry: Entry, frame: Frame) -> str:
    """The line as the text has it, with `{layer}` for the layer's number in names."""
    assert entry.template is not None
    names = [frame.names(node) for node in variables_of(entry.node)]
    code = entry.template.filled(names)
    if entry.node.op == "placeholder":
        return frame.names(entry.node)
    return code if entry.node.op == "output" else f"{_assigned(entry, frame)} = {code}"
