"""What is shown of a program: its passes in order, and before and after each of them, side by side.

A `Timeline` is plain data. The page, the terminal, notebooks and exports all draw the same one; `to_json()`
is what `moec show --json` prints and what the page carries. Nothing here reads a graph: `moec.view.filming`
does.

Blocks that are alike are drawn once. Strings of a drawing hold `{layer}` where the number of the layer stood
(`moe_{layer}.up.weight`); names of variables are those of the first block of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from moec.errors import MoecError
from moec.ir import Entry

FORMAT = 1
LAYER = "{layer}"

Status = Literal["kept", "moved", "rewired", "created", "removed"]


@dataclass(frozen=True)
class Weight:
    """A weight that an operator reads: structural `name` (`moe_{layer}.up.weight`), `origin` as in
    `program.origins`, `placement` ('' where it is whole on every rank), number of elements."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    origin: str
    parameters: int
    placement: str = ""


@dataclass(frozen=True)
class Side:
    """A node as it stands on one side: `code`, the line of the program's text; `value`, shape and dtype as
    the text spells them (`bf16 [B, S, 768]`).

    `operator`: `aten.linear`, `input` and `output` for what enters and leaves the block. `path`, `source`: of
    the user's model. `region`: index into the drawing's regions, None directly in the block. `placement`: as
    the text says it. `collective`, `axis`: the message it sends and between whom, '' for none. `flops`,
    `bytes`: numbers at the timeline's sizes, None where not counted; `flops_text`: as an expression.
    """

    name: str
    code: str
    operator: str
    value: str = ""
    path: str = ""
    source: str = ""
    region: int | None = None
    placement: str = ""
    collective: str = ""
    axis: str = ""
    flops: float | None = None
    bytes: float | None = None
    flops_text: str = ""
    weights: tuple[Weight, ...] = ()


@dataclass(frozen=True)
class Node:
    """One operator in both pictures. `before` is None where it was created, `after` where it was removed.
    One that moved to another block stands in both, with one side in each.

    `moved`: it stands in another region now; `rewired`: what it reads or its options are others. `made_from`:
    indices of the nodes of the drawing that it was made from. `fused_by`: the pass that fused it, or ''.
    """

    status: Status
    before: Side | None
    after: Side | None
    made_from: tuple[int, ...] = ()
    fused_by: str = ""


@dataclass(frozen=True)
class RegionBox:
    """A region of a drawing: `moe_{layer}`, kind `moe`. `plan`: lines of the plan that asked for it, as
    indices into `Timeline.plan_lines`; `settings`: what the plan chose, spelled. `code`: the line that calls
    it; `signature`: what it takes and gives, `moe_{layer}(x) → y, balance, z, counts`."""

    name: str
    kind: str
    path: str
    source: str
    status: Status
    settings: Mapping[str, str] = field(default_factory=dict)
    plan: tuple[int, ...] = ()
    code: str = ""
    signature: str = ""


@dataclass(frozen=True)
class Drawing:
    """A block before and after. `edges`: (from, to, side), side 0 on both, 1 before alone, 2 after alone."""

    nodes: tuple[Node, ...]
    regions: tuple[RegionBox, ...]
    edges: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Section:
    """Blocks of one step that are alike: `layers` are their numbers, empty for what stands outside of blocks
    (`embedding`, `head`); `drawing` is an index into `Timeline.drawings`. `changed`: not every line and
    region was kept. `before`: the numbers that the same blocks had before, where a pass numbered anew; then
    `{layer}` on the side before stands for these."""

    title: str
    layers: tuple[int, ...]
    drawing: int
    changed: bool
    before: tuple[int, ...] = ()


@dataclass(frozen=True)
class Check:
    """The certificate of a pass: `error` and `tolerance` of its worst check, None where nothing was
    checked."""

    contract: str
    verdict: str
    error: float | None
    tolerance: float | None
    what: str
    note: str


@dataclass(frozen=True)
class Step:
    """One entry of the timeline: a pass (`kind` "pass"), or all passes from one stage to the next ("stage").

    `doc`: the pass's docstring with its drawing. `diff`: the hierarchical diff of the texts, '' for none.
    `counts`: nodes of the whole program by status.
    """

    name: str
    kind: Literal["capture", "pass", "stage"]
    before: str
    after: str
    doc: str
    check: Check | None
    seconds: float
    counts: Mapping[str, int]
    sections: tuple[Section, ...]
    diff: str


@dataclass(frozen=True)
class Timeline:
    """Everything that is shown of a program. `sizes`: the letters' numbers for FLOPs and bytes. `sources`:
    the user's lines that nodes refer to, by `file.py:line`. `text`: the program as it is now."""

    name: str
    stage: str
    version: str
    facts: Mapping[str, str]
    sizes: Mapping[str, int]
    plan_lines: tuple[str, ...]
    steps: tuple[Step, ...]
    drawings: tuple[Drawing, ...]
    ledger: tuple[Entry, ...]
    notes: tuple[str, ...]
    sources: Mapping[str, str]
    text: str

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON, with its `format`.

        Each side is said once, in `sides`; nodes have its place there as `before` and `after`, or None.
        """
        sides: dict[Side, int] = {}
        drawings = [_interned(drawing, sides) for drawing in self.drawings]
        rest = asdict(replace(self, drawings=()))
        return {"format": FORMAT, **rest, "drawings": drawings, "sides": [asdict(side) for side in sides]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timeline:
        """The timeline that `to_json` wrote. Raises `MoecError` for what is none, or of another format."""
        if data.get("format") != FORMAT:
            raise MoecError("timeline", f"format {data.get('format')!r}", f"format {FORMAT}")
        told = {key: value for key, value in data.items() if key not in ("format", "sides")}
        try:
            drawings = [_opened(drawing, data["sides"]) for drawing in data["drawings"]]
            return TypeAdapter(cls).validate_python({**told, "drawings": drawings})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, ("timeline", *first["loc"])))
            raise MoecError(where, first["msg"], "what to_json() wrote") from None
        except (KeyError, IndexError, TypeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise MoecError("timeline.drawings", found, "what to_json() wrote") from None


def _interned(drawing: Drawing, sides: dict[Side, int]) -> dict[str, Any]:
    """A drawing whose nodes have their sides by number; new ones are added to `sides`."""

    def place(side: Side | None) -> int | None:
        return None if side is None else sides.setdefault(side, len(sides))

    nodes = [
        {
            "status": node.status, "before": place(node.before), "after": place(node.after),
            "made_from": node.made_from, "fused_by": node.fused_by,
        }
        for node in drawing.nodes
    ]  # fmt: skip
    return {"nodes": nodes, "regions": [asdict(box) for box in drawing.regions], "edges": drawing.edges}


def _opened(drawing: Mapping[str, Any], sides: Sequence[Any]) -> dict[str, Any]:
    """The inverse of `_interned`."""

    def side(place: int | None) -> Any:
        return None if place is None else sides[place]

    nodes = [
        {**node, "before": side(node["before"]), "after": side(node["after"])} for node in drawing["nodes"]
    ]
    return {**drawing, "nodes": nodes}
