"""The records of a program as plain data for the manifest, and back."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, fx

from moec.errors import ArtifactError
from moec.ir.ledger import Entry, Ledger
from moec.ir.mesh import Mesh
from moec.ir.placement import Layout
from moec.ir.program import Program, Source, Tokenizer
from moec.ir.region import Region, region_of, regions

from .manifest import (
    NAME,
    REBUILD,
    Manifest,
    PartitionRecord,
    RegionRecord,
    Sheet,
    SourceRecord,
    TokenizerRecord,
)
from .weights import dtype_name, dtype_named, weights_of


def unused_key(name: str) -> str:
    """The tensor in which a saved program keeps state of the model that its forward never reads."""
    return f"unused:{name}"


def unused_tensors(source: Source) -> dict[str, Tensor]:
    """That state, by the names of its tensors."""
    return {unused_key(name): value for name, value in source.unused.items()}


def source_record(source: Source) -> SourceRecord:
    """What is known of the source model, without its tensors."""
    words = source.tokenizer
    return SourceRecord(
        name=source.name, vocabulary=source.vocabulary, dtype=dtype_name(source.dtype),
        max_positions=source.max_positions, aliases=dict(source.aliases),
        unused={name: unused_key(name) for name in source.unused}, notes=list(source.notes),
        tokenizer=None if words is None else TokenizerRecord(name=words.name, digest=words.digest),
    )  # fmt: skip


def source_of(record: SourceRecord, tensors: Mapping[str, Tensor] | None) -> Source:
    """The inverse of `source_record`; without `tensors` the idle state is missing."""
    unused = {name: tensors[key] for name, key in record.unused.items()} if tensors is not None else {}
    words = record.tokenizer
    return Source(
        name=record.name, vocabulary=record.vocabulary, dtype=dtype_named(record.dtype),
        max_positions=record.max_positions, aliases=record.aliases, unused=unused, notes=tuple(record.notes),
        tokenizer=None if words is None else Tokenizer(words.name, words.digest),
    )  # fmt: skip


def sheet_fields(program: Program) -> dict[str, Any]:
    """What a `Sheet` records of `program`."""
    return {
        "stage": program.stage,
        "origins": {name: origin.record() for name, origin in program.origins.items()},
        "ledger": [asdict(entry) for entry in program.ledger],
        "notes": list(program.ledger.notes),
        "certificates": [certificate.to_json() for certificate in program.certificates],
        "regions": region_records(program.graph),
        "nodes": places_of(program.graph),
        "placements": placements_of(program.graph),
    }


def partition_record(local: Program, whole: Program, text: str) -> PartitionRecord:
    """The record of the program of one rank, whose text is in the file `text`.

    Raises `ArtifactError` when it reads a weight that is no part of one of `whole`: it could not be loaded.
    """
    layout, rank = whole.layout, local.rank
    assert layout is not None
    assert rank is not None
    coordinates, known = layout.mesh.coordinates(rank), weights_of(whole.graph)
    weights = whole_names(local, whole)
    for name, value in weights_of(local.graph).items():
        shape = tuple(known[weights[name]].shape) if name in weights else None
        if shape is None or layout.of(weights[name]).local_shape(shape, coordinates) != tuple(value.shape):
            found = f"{name} {list(value.shape)} of rank {rank}"
            raise ArtifactError("save", found, f"its part of a weight of the whole program ({shape})")
    return PartitionRecord(text=text, weights=weights, **sheet_fields(local))


def whole_names(local: Program, whole: Program) -> dict[str, str]:
    """Each weight of the program of a rank → the weight of the whole program that it is a part of.

    A pass may move a weight to another region; it keeps its public name.
    """
    public = {whole.origins.public_name(name): name for name in weights_of(whole.graph)}
    names = {name: local.origins.public_name(name) for name in weights_of(local.graph)}
    return {name: public[seen] for name, seen in names.items() if seen in public}


def layout_fields(layout: Layout | None) -> dict[str, Any]:
    """What a `Manifest` records of the mesh and the placements; nothing for a program of one process."""
    return {} if layout is None else {"layout": layout.to_json(), "groups": _first_groups(layout.mesh)}


def _first_groups(mesh: Mesh) -> dict[str, list[int]]:
    return {axis: list(mesh.group(axis, 0)) for axis in mesh.axes()}


def layout_of(manifest: Manifest) -> Layout | None:
    """The inverse of `layout_fields`; `ArtifactError` when the mesh has other groups today."""
    if manifest.layout is None:
        return None
    try:
        layout = Layout.of_json(manifest.layout)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        found = f"a layout that cannot be read: {error}"
        raise ArtifactError(NAME, found, "mesh and placements", REBUILD) from None
    groups, saved = _first_groups(layout.mesh), manifest.groups
    odd = sorted(axis for axis in {*groups, *saved} if groups.get(axis) != saved.get(axis))
    if odd:
        found = f"the axis {odd[0]} with the ranks {saved.get(odd[0])}"
        raise ArtifactError(NAME, found, f"{groups.get(odd[0])}, as this moec forms it", REBUILD)
    return layout


def region_records(root: fx.GraphModule) -> dict[str, RegionRecord]:
    """One record for each region that the root calls."""
    found = {name: region_of(module) for name, module in regions(root).items()}
    return {name: RegionRecord(**asdict(region)) for name, region in found.items() if region is not None}


def regions_of(sheet: Sheet) -> dict[str, Region]:
    """The inverse of `region_records`."""
    return {name: Region(**record.model_dump()) for name, record in sheet.regions.items()}


def ledger_of(sheet: Sheet) -> Ledger:
    """The ledger; its entries were saved by `dataclasses.asdict`."""
    entries = [Entry(**data | {"shape": tuple(data["shape"])}) for data in sheet.ledger]
    return Ledger(entries, sheet.notes)


def places_of(root: fx.GraphModule) -> dict[str, dict[str, tuple[str, str]]]:
    """For the root ('') and every region: node → the user's module path and source line."""
    return {
        name: {
            _key(node): (str(node.meta.get("path") or ""), str(node.meta.get("source") or ""))
            for node in module.graph.nodes
            if node.op.startswith("call") and (node.meta.get("path") or node.meta.get("source"))
        }
        for name, module in _graphs(root)
    }


def placements_of(root: fx.GraphModule) -> dict[str, dict[str, str]]:
    """For the root ('') and every region that has any: node, or `self.up.weight`, → where it lies."""
    found = {
        name: {_key(n): str(n.meta["placement"]) for n in module.graph.nodes if n.meta.get("placement")}
        for name, module in _graphs(root)
    }
    return {name: placements for name, placements in found.items() if placements}


def _key(node: fx.Node) -> str:
    """What the text calls a node: a weight by its name, a list by those of its items."""
    if node.op == "get_attr":
        return f"self.{node.target}"
    items = {user.args[1]: user.name for user in node.users if user.target is operator.getitem}
    if len(items) == len(node.users) > 0 and all(type(index) is int for index in items):
        return ", ".join(items[index] for index in sorted(items))  # type: ignore[type-var]
    return node.name


def restore_places(root: fx.GraphModule, sheet: Sheet) -> None:
    """The inverse of `places_of` and `placements_of`; changes only metadata of nodes."""
    for name, module in _graphs(root):
        places, placements = sheet.nodes.get(name, {}), sheet.placements.get(name, {})
        for node in module.graph.nodes:
            path, source = places.get(_key(node), ("", ""))
            known = {"path": path, "source": source, "placement": placements.get(_key(node), "")}
            node.meta |= {key: value for key, value in known.items() if value}


def _graphs(root: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    yield "", root
    yield from regions(root).items()
