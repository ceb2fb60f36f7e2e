"""The records of a program as plain data for the manifest, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor, fx

from moec.ir.ledger import Entry, Ledger
from moec.ir.program import Source
from moec.ir.region import Region, region_of, regions

from .manifest import Manifest, RegionRecord, SourceRecord
from .weights import dtype_name, dtype_named


def unused_key(name: str) -> str:
    """The tensor in which a saved program keeps state of the model that its forward never reads."""
    return f"unused:{name}"


def source_record(source: Source) -> SourceRecord:
    """What is known of the source model, without its tensors."""
    return SourceRecord(
        name=source.name, vocabulary=source.vocabulary, dtype=dtype_name(source.dtype),
        max_positions=source.max_positions, aliases=dict(source.aliases),
        unused={name: unused_key(name) for name in source.unused}, notes=list(source.notes),
    )  # fmt: skip


def source_of(record: SourceRecord, tensors: Mapping[str, Tensor] | None) -> Source:
    """The inverse of `source_record`; without `tensors` the idle state is missing."""
    unused = {name: tensors[key] for name, key in record.unused.items()} if tensors is not None else {}
    return Source(
        name=record.name, vocabulary=record.vocabulary, dtype=dtype_named(record.dtype),
        max_positions=record.max_positions, aliases=record.aliases, unused=unused, notes=tuple(record.notes),
    )  # fmt: skip


def region_records(root: fx.GraphModule) -> dict[str, RegionRecord]:
    """One record for each region that the root calls."""
    found = {name: region_of(module) for name, module in regions(root).items()}
    return {name: RegionRecord(**asdict(region)) for name, region in found.items() if region is not None}


def regions_of(manifest: Manifest) -> dict[str, Region]:
    """The inverse of `region_records`."""
    return {name: Region(**record.model_dump()) for name, record in manifest.regions.items()}


def ledger_of(manifest: Manifest) -> Ledger:
    """The ledger; its entries were saved by `dataclasses.asdict`."""
    entries = [Entry(**data | {"shape": tuple(data["shape"])}) for data in manifest.ledger]
    return Ledger(entries, manifest.notes)


def places_of(root: fx.GraphModule) -> dict[str, dict[str, tuple[str, str]]]:
    """For the root ('') and every region: node → the user's module path and source line."""
    return {
        name: {
            node.name: (str(node.meta.get("path") or ""), str(node.meta.get("source") or ""))
            for node in module.graph.nodes
            if node.op.startswith("call") and (node.meta.get("path") or node.meta.get("source"))
        }
        for name, module in [("", root), *regions(root).items()]
    }


def restore_places(root: fx.GraphModule, manifest: Manifest) -> None:
    """The inverse of `places_of`; changes only metadata of nodes."""
    for name, module in [("", root), *regions(root).items()]:
        places = manifest.nodes.get(name, {})
        for node in module.graph.nodes:
            if node.name in places:
                path, source = places[node.name]
                node.meta |= {key: value for key, value in (("path", path), ("source", source)) if value}
