"""A program for Google's model-explorer: one graph for each stage, as a graph collection in JSON.

The shapes of the data are those of `model_explorer.graph_builder` (GraphCollection, Graph, GraphNode). A
block is a layer of its own there, and a region a layer inside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moec.ir import Program
from moec.ir.stages import STAGES
from moec.view.drawings import code_of
from moec.view.filming import NOW, Film, letters_of
from moec.view.numbering import filled
from moec.view.overlays import Amounts
from moec.view.stills import Entry, Frame, Still
from moec.view.whole_file import write_whole

Data = dict[str, Any]


def graph_collection(program: Program, **sizes: int) -> Data:
    """The collection: `label`, and `graphs`, one for every stage that is remembered and one for the present.

    `sizes`: as of `moec.view.filming.timeline_of`.
    """
    film = Film(program, letters_of(program, sizes))
    names = [name for name in film.graphs if name in STAGES and name != program.stage]
    graphs = [_graph(film, name, name) for name in names]
    return {"label": program.source.name, "graphs": [*graphs, _graph(film, NOW, program.stage)]}


def write_collection(program: Program, path: str | Path, **sizes: int) -> Path:
    """Write `graph_collection` to a file: whole, or not at all; gives the path."""
    text = json.dumps(graph_collection(program, **sizes), ensure_ascii=False, separators=(",", ":"))
    return write_whole(path, text, "the graph collection")


def _graph(film: Film, snapshot: str, name: str) -> Data:
    frame = film.frame(snapshot)
    nodes: list[Data] = []
    groups: dict[str, dict[str, str]] = {}
    for still in frame.stills.values():
        amounts = film.drawings.overlays.of(frame, still)
        nodes += (
            _node(entry, amount, frame, still)
            for entry, amount in zip(still.entries, amounts, strict=True)
            if entry.kind == "line"
        )
        groups |= _groups(still)
    return {"id": name, "nodes": nodes, "groupNodeAttributes": groups}


def _identifier(entry: Entry) -> str:
    assert entry.drawn is not None
    return f"{entry.drawn.region}.{entry.node.name}" if entry.drawn.region else str(entry.node.name)


def _namespace(still: Still, region: str) -> str:
    """`block 3/moe_3`; a slash in a name would open a layer, so there is none."""
    parts = [f"block {still.key}" if still.layer is not None else still.title, region]
    return "/".join(part.replace("/", "∕") for part in parts if part)


def _node(entry: Entry, amounts: Amounts, frame: Frame, still: Still) -> Data:
    assert entry.drawn is not None
    reads = [frame.line_of[node] for node in entry.drawn.reads.nodes]
    edges = [
        {"sourceNodeId": _identifier(read), "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
        for place, read in enumerate(reads)
    ]
    return {
        "id": _identifier(entry),
        "label": entry.facts.operator,
        "namespace": _namespace(still, entry.drawn.region),
        "attrs": [{"key": key, "value": value} for key, value in _attributes(entry, amounts, frame, still)],
        "incomingEdges": edges,
        "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": entry.facts.value}]}],
    }


def _attributes(entry: Entry, amounts: Amounts, frame: Frame, still: Still) -> Iterator[tuple[str, str]]:
    """What the side panel lists; nothing that is not known."""
    facts, layer = entry.facts, still.layer
    told = {
        "code": filled(code_of(entry, frame), layer),
        "path": filled(facts.path, layer), "source": facts.source,
        "placement": facts.placement, "collective": facts.collective, "axis": facts.axis,
        "flops": amounts.text or _number(amounts.flops), "bytes": _number(amounts.bytes),
    }  # fmt: skip
    yield from ((key, value) for key, value in told.items() if value)
    for weight in facts.weights:
        shape = "×".join(map(str, weight.shape))
        said = " · ".join(filter(None, [f"{weight.dtype} {shape}", weight.origin, weight.placement]))
        yield filled(weight.name, layer), filled(said, layer)


def _number(amount: float | None) -> str:
    return f"{amount:,.0f}" if amount else ""


def _groups(still: Still) -> dict[str, dict[str, str]]:
    """What is told of the regions of a block."""
    found = {}
    for box in still.boxes:
        facts = {"kind": box.kind, "path": filled(box.path, still.layer), "source": box.source}
        named = _namespace(still, str(box.call.target))
        found[named] = {key: value for key, value in {**facts, **dict(box.settings)}.items() if value}
    return found
