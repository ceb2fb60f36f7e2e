"""Stills: the blocks of one graph, each with what enters it, its lines, and what leaves it.

Two stills with the same `face` are alike: they differ in the layer's number and the names of variables alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx

from moec.ir import Region, region_of
from moec.ir.described import Described, short_dtype
from moec.ir.graphs import attribute, output
from moec.ir.spelling import local_name
from moec.ir.text import kinds_below, unpacked
from moec.plan import LayerSettings
from moec.view.exchanges import exchange_of
from moec.view.flow import Drawn, Flow
from moec.view.numbering import templated
from moec.view.templates import Known, Template, TemplateSpelling, variables_of
from moec.view.timeline import LAYER, Weight

EMBEDDING, BETWEEN, HEAD, WHOLE = "embedding", "between blocks", "head", "program"


@dataclass(frozen=True)
class Facts:
    """What is said of a line beside its code; see `moec.view.timeline.Side`."""

    operator: str
    value: str
    path: str = ""
    source: str = ""
    placement: str = ""
    collective: str = ""
    axis: str = ""
    weights: tuple[Weight, ...] = ()

    @property
    def said(self) -> Hashable:
        """What the value is, where it lies, and where the weights lie."""
        weights = tuple((one.shape, one.dtype, one.placement) for one in self.weights)
        return self.value, self.placement, weights


@dataclass(frozen=True)
class Entry:
    """One node of a still. `kind`: `input` and `output` for a value that crosses the border; `node`: of the
    graph, outside of the block for inputs; `reads`: entries of the still, by their place."""

    kind: Literal["input", "line", "output"]
    node: fx.Node
    facts: Facts
    drawn: Drawn | None = None
    template: Template | None = None
    reads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Box:
    """A region of a still; `settings`: what the plan chose, spelled; `plan`: the plan's lines that did."""

    name: str
    call: fx.Node
    kind: str
    path: str
    source: str
    settings: tuple[tuple[str, str], ...]
    plan: tuple[int, ...]


@dataclass(frozen=True)
class Still:
    """A block of a graph: `title` where it has no number, `layer` where it has one, `path` of the block."""

    key: str
    title: str
    layer: int | None
    entries: tuple[Entry, ...]
    boxes: tuple[Box, ...]
    face: Hashable


@dataclass
class Frame:
    """One graph, taken apart into stills (`stills`, by key, in running order).

    `origin_of`: what is told of a weight, by name and tensor; `plan_of`: lines of the plan that asked for a
    region; `of_one_rank`: it is not the graph of all ranks; `known`: what was spelled for other frames.
    """

    root: fx.GraphModule
    origin_of: Callable[[str, Tensor], str]
    plan_of: Callable[[Region], tuple[int, ...]]
    known: Known
    of_one_rank: bool = False
    stills: dict[str, Still] = field(default_factory=dict)
    words: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.values = Described(self.root)
        self.flow = Flow(self.root)
        kinds = kinds_below(self.root)
        self._spelling = {path: TemplateSpelling(kinds[path], self.known) for path in kinds}
        keys = _keys(self.flow.lines)
        self._key = {line.node: key for line, key in zip(self.flow.lines, keys, strict=True)}
        self._crossing = self._crossings()
        self.line_of: dict[fx.Node, Entry] = {}
        for key in dict.fromkeys(keys):
            lines = [line for line in self.flow.lines if self._key[line.node] == key]
            self.stills[key] = self._still(key, lines)
            self.line_of |= {one.node: one for one in self.stills[key].entries if one.kind == "line"}

    def names(self, node: fx.Node) -> str:
        """The variable of a node, as the text calls it."""
        return local_name(node.name, self.words)

    def _crossings(self) -> set[fx.Node]:
        """Lines whose value another block reads."""
        return {
            read
            for line in self.flow.lines
            for read in line.reads.nodes
            if self._key[read] != self._key[line.node]
        }

    def _still(self, key: str, lines: list[Drawn]) -> Still:
        number = key.partition(" · ")[0]
        layer = int(number) if number.isdigit() else None
        own = {line.node for line in lines}
        entering = list(dict.fromkeys(n for line in lines for n in line.reads.nodes if n not in own))
        entries = [
            Entry("input", node, Facts("input", self.values.of(node.meta.get("val")))) for node in entering
        ]
        places = {node: place for place, node in enumerate([*entering, *(line.node for line in lines)])}
        entries += [self._line(line, layer, places) for line in lines]
        entries += [
            Entry("output", line.node, self._crossed("output", line.node), reads=(places[line.node],))
            for line in lines
            if line.node in self._crossing
        ]
        regions = dict.fromkeys(line.region for line in lines if line.region)
        boxes = tuple(self._box(name, layer) for name in regions)
        face = (key if layer is None else "", _face(entries, list(regions)), tuple(map(_facts_of, boxes)))
        return Still(key, "" if layer is not None else key, layer, tuple(entries), boxes, face)

    def _crossed(self, operator: str, node: fx.Node) -> Facts:
        """What is said of a value at the border of a block."""
        return Facts(operator, self.values.of(node.meta.get("val")))

    def _line(self, line: Drawn, layer: int | None, places: dict[fx.Node, int]) -> Entry:
        template = self._spelling[line.region].template(line.node, layer)
        self.words |= template.words
        node = line.node
        sent, axis = exchange_of(node)
        facts = Facts(
            _operator(node),
            self.values.of(node.meta.get("val")),
            templated(str(node.meta.get("path") or ""), layer),
            str(node.meta.get("source") or ""),
            str(node.meta.get("placement") or ""),
            sent,
            axis,
            tuple(self._weight(name, read, layer) for name, read in line.reads.weights),
        )
        reads = tuple(places[read] for read in line.reads.nodes)
        return Entry("line", node, facts, line, template, reads)

    def _weight(self, name: str, read: fx.Node, layer: int | None) -> Weight:
        value = attribute(self.root, name)
        assert isinstance(value, Tensor)
        return Weight(
            templated(name, layer),
            tuple(value.shape),
            short_dtype(value.dtype),
            templated(self.origin_of(name, value), layer),
            value.numel(),
            str(read.meta.get("placement") or ""),
        )

    def _box(self, name: str, layer: int | None) -> Box:
        record = region_of(self.root.get_submodule(name)) or Region(name, 0)
        settings = tuple(
            (key, str(value)) for key, value in record.settings.items() if key in LayerSettings.model_fields
        )
        path = templated(record.path, layer)
        plan = self.plan_of(record)
        call = self.flow.calls[name]
        return Box(templated(name, layer), call, record.kind, path, record.source, settings, plan)

    def call_line(self, box: Box) -> str:
        """How the text calls a region: `a_0 = self.attention_{layer}(n_0)`."""
        template = self._spelling[""].template(box.call, self._layer_of(box))
        items = unpacked(box.call, self.root)
        names = ", ".join("_" if item is None else self.names(item) for item in items)
        made = names + ("," if len(items) == 1 else "") if items else self.names(box.call)
        return f"{made} = {template.filled([self.names(node) for node in variables_of(box.call)])}"

    def _layer_of(self, box: Box) -> int | None:
        found = region_of(self.root.get_submodule(str(box.call.target)))
        return found.index if found is not None and LAYER in box.name else None

    def signature(self, box: Box) -> str:
        """What a region takes and gives: `attention_{layer}(x) → y`."""
        name = str(box.call.target)
        child = self.root.get_submodule(name)
        assert isinstance(child, fx.GraphModule)
        inputs = [self.names(node) for node in child.graph.nodes if node.op == "placeholder"]
        end = output(child.graph)
        template = self._spelling[name].template(end, None)
        given = template.filled([self.names(node) for node in variables_of(end)])
        return f"{box.name}({', '.join(inputs)}) → {given.removeprefix('return ')}"


def _keys(lines: Iterable[Drawn]) -> list[str]:
    """The block of each line, those outside of blocks by what they stand before or behind."""
    blocks = [line.block for line in lines]
    inside = [place for place, block in enumerate(blocks) if block]
    if not inside:
        return [WHOLE] * len(blocks)
    outside = [
        EMBEDDING if place < inside[0] else HEAD if place > inside[-1] else BETWEEN
        for place in range(len(blocks))
    ]
    return [block or instead for block, instead in zip(blocks, outside, strict=True)]


def _operator(node: fx.Node) -> str:
    """`aten.linear`, `input` and `output`; for other calls what is called."""
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input"}.get(node.op, node.op)
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else str(getattr(node.target, "__name__", node.target))


class _Numbers(dict[fx.Node, int]):
    """Variables by their first appearance."""

    def __missing__(self, node: fx.Node) -> int:
        self[node] = len(self)
        return self[node]


def _face(entries: list[Entry], regions: list[str]) -> Hashable:
    """What makes a still what it is, names of variables counted off."""
    numbers = _Numbers()
    return tuple(_entry_face(entry, numbers, regions) for entry in entries)


def _entry_face(entry: Entry, numbers: _Numbers, regions: list[str]) -> Hashable:
    if entry.template is None or entry.drawn is None:
        return entry.kind, numbers[entry.node], entry.facts, entry.reads
    read = variables_of(entry.node)
    used = tuple(numbers[read[place]] for place in entry.template.order)
    made = tuple(-1 if item is None else numbers[item] for item in entry.drawn.items or (entry.node,))
    region = regions.index(entry.drawn.region) if entry.drawn.region else -1
    return entry.template.code, used, made, bool(entry.drawn.items), region, entry.facts, entry.reads


def _facts_of(box: Box) -> Hashable:
    return box.name, box.kind, box.path, box.source, box.settings, box.plan
