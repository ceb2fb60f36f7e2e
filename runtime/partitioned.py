"""A placed program on disk, saved and loaded by the ranks of a job: each writes and reads its own bytes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from moec.errors import ArtifactError
from moec.ir.placement import Layout, Placement
from moec.ir.program import Program
from moec.runtime.ranks import Ranks

from .artifact import write_records
from .drafts import put_in_place, require_place
from .manifest import NAME, REBUILD, FileRecord, Manifest, WeightRecord, read_manifest, record_of
from .manifest_records import layout_of, unused_tensors, whole_names
from .part_files import FOLDER, group_parts, read_part, write_part
from .saved import Saved
from .weights import LARGEST_FILE, describe_weights, weights_of

P = TypeVar("P", bound=Program)


def save_part(
    local: Program, whole: Program, directory: str | Path, *, largest_file: int = LARGEST_FILE
) -> Path:
    """Save a program of which every rank holds a part, `local`; all ranks call this with the same folder.

    Each writes the parts that no rank before it holds, and the first one the rest: text and records of
    `whole`, whose own weights are not read, and the idle state of `local`. The folder is renamed into place
    when all are done, so it is whole or not there. Raises `ArtifactError`, on every rank, when one of them
    cannot write its part.
    """
    target, layout, rank = Path(directory), local.layout, local.rank
    assert layout is not None
    assert rank is not None
    draft = target.with_name(f".{target.name}-saving")
    tensors = _whole_named(local, whole)
    ranks = Ranks(layout.mesh, rank, next(iter(tensors.values())).device)
    idle = unused_tensors(local.source) if ranks.is_first else {}
    groups = group_parts(describe_weights(whole.graph), layout, idle, largest_file)
    try:
        with ranks.together():
            if ranks.is_first:
                _make_draft(draft, target)
        with ranks.together():
            files = write_part(draft, groups, layout, rank, tensors | idle)
            written = {file: record_of(draft / file).model_dump() for file in files}
        everyone = ranks.gather(written)
        with ranks.together():
            if ranks.is_first:
                known = {name: FileRecord.model_validate(row[name]) for row in everyone for name in row}
                write_records(whole, draft, local=local, parts=groups, known=known)
                put_in_place(draft, target)
    finally:
        if ranks.is_first:
            shutil.rmtree(draft, ignore_errors=True)
    return target


def _whole_named(local: Program, whole: Program) -> dict[str, Tensor]:
    """The parts of this rank by the names of the whole weights; `ArtifactError` when they are on `meta`."""
    names = whole_names(local, whole)
    tensors = {names[name]: value for name, value in weights_of(local.graph).items() if name in names}
    hollow = next((name for name, value in tensors.items() if value.device.type == "meta"), None)
    if hollow is not None:
        needed = "weights, or save() of the whole program, which may be on meta"
        raise ArtifactError("save", f"{hollow} of rank {local.rank} is on meta", needed)
    return tensors


def _make_draft(draft: Path, target: Path) -> None:
    require_place(target, NAME)
    shutil.rmtree(draft, ignore_errors=True)
    (draft / FOLDER).mkdir(parents=True)
    for folder in (draft, draft / FOLDER):
        folder.chmod(target.parent.stat().st_mode & 0o777)


def load_part(
    directory: str | Path,
    rank: int,
    kind: type[P],
    *,
    trust: bool = False,
    device: torch.device | str = "cpu",
) -> P:
    """The program of `rank` as saved in `directory`, built as a `kind`; no other rank's bytes are read.

    Rank 0 also keeps the idle state of the model. `device="meta"` reads no weights. Raises `ArtifactError`
    when the folder holds no placed program, has no such rank, or when anything that this rank reads is
    missing, cut short or edited; the file is named.
    """
    folder, place = Path(directory), torch.device(device)
    manifest = read_manifest(folder, trust=trust)
    layout, partition = layout_of(manifest), manifest.partition
    if layout is None or partition is None:
        needed = "a program placed on ranks: moec.compile(model, plan, world=N).save(folder)"
        raise ArtifactError(str(folder), "a program for one process", needed)
    if not 0 <= rank < layout.mesh.world:
        found = f"rank {rank} of a program on {layout.mesh.world}"
        raise ArtifactError(str(folder), found, f"a rank from 0 to {layout.mesh.world - 1}", REBUILD)
    saved = Saved(folder, manifest, layout, trust)
    read = place.type != "meta" and manifest.parts is not None
    tensors = read_part(folder, manifest, layout, rank, place) if read else None
    records = _local_records(manifest, partition.weights, layout, rank)
    graph = saved.graph(partition.text, partition, records, tensors, place)
    return saved.program(kind, graph, partition, tensors if rank == 0 else None, rank=rank)


def _local_records(
    manifest: Manifest, weights: Mapping[str, str], layout: Layout, rank: int
) -> list[WeightRecord]:
    """What the parts of `rank` look like: the records of the whole weights, with local names and shapes."""
    known, coordinates = {record.name: record for record in manifest.weights}, layout.mesh.coordinates(rank)
    missing = next((name for name in weights.values() if name not in known), None)
    if missing is not None:
        raise ArtifactError(NAME, f"no weight {missing!r}", "the weights of the partition", REBUILD)
    return [
        _part_record(known[whole], name, layout.of(whole), coordinates) for name, whole in weights.items()
    ]


def _part_record(
    record: WeightRecord, name: str, placement: Placement, coordinates: Mapping[str, int]
) -> WeightRecord:
    shape = list(placement.local_shape(record.shape, coordinates))
    return record.model_copy(update={"name": name, "shape": shape})
