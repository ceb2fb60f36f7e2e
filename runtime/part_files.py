"""The weights of a placed program on disk: one file for every distinct part, written once.

    parts/whole.safetensors                              what every rank holds whole
    parts/tensor-3.safetensors                           the fourth of the parts that go over `tensor`
    parts/expert_64x2-17.slice_64x2-1.safetensors        one slice of the experts of rank 35
    parts/idle.safetensors                               state that the forward never reads; the first rank's

Weights that are split over the same axes lie in one file a place, so a rank opens one file for each set of
axes and reads nothing but its own bytes, from start to end: a row-parallel matrix cut out of one whole tensor
would be thousands of small reads. A file's checksum speaks of one rank's bytes alone, so checking it costs no
rank another's. A node that holds only the files of its ranks can start.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moec.errors import ArtifactError
from moec.ir.placement import Layout, Placement

from .manifest import REBUILD, Manifest, PartGroup, WeightRecord, require_whole
from .weights import dtype_named, grouped, read_tensors, write_file

FOLDER, IDLE = "parts", "idle"

Coordinates = Mapping[str, int]


def group_parts(
    records: Iterable[WeightRecord], layout: Layout, idle: Iterable[str], largest: int
) -> list[PartGroup]:
    """The tensors of `records` by the axes that they are split over, in groups whose files hold at most
    `largest` bytes (a bigger part gets one alone); `idle` tensors last."""
    of_axes: dict[tuple[str, ...], dict[str, int]] = {}
    for record in records:
        if record.name == record.tensor:
            placement = layout.of(record.name)
            of_axes.setdefault(axes_of(placement), {})[record.name] = _part_bytes(record, placement)
    groups = [
        PartGroup(axes=list(axes), tensors=names, number=number, of=len(files))
        for axes, sizes in of_axes.items()
        for files in [grouped(sizes, largest)]
        for number, names in enumerate(files, 1)
    ]
    idle = list(idle)
    return [*groups, PartGroup(axes=[], tensors=idle, idle=True)] if idle else groups


def axes_of(placement: Placement) -> tuple[str, ...]:
    """The axes that a weight is split over, sorted by name; none when it is whole on every rank."""
    return tuple(sorted(split.axis for split in placement.splits))


def _part_bytes(record: WeightRecord, placement: Placement) -> int:
    """The size of the first part: no other is larger."""
    shape = placement.local_shape(record.shape, dict.fromkeys(axes_of(placement), 0))
    return torch.Size(shape).numel() * dtype_named(record.dtype).itemsize


def part_file(group: PartGroup, coordinates: Coordinates) -> str:
    """The file of `group` for the rank at `coordinates` (axis → place; axes of other groups are ignored)."""
    places = ".".join(f"{axis}-{coordinates[axis]}" for axis in group.axes)
    number = f".{group.number:05d}-of-{group.of:05d}" if group.of > 1 else ""
    return f"{FOLDER}/{IDLE if group.idle else places or 'whole'}{number}.safetensors"


def places_of_group(group: PartGroup, layout: Layout) -> Iterator[dict[str, int]]:
    """The coordinates of every distinct part of `group`, one for each of its files."""
    sizes = layout.mesh.axes()
    for chosen in itertools.product(*(range(sizes[axis]) for axis in group.axes)):
        yield dict(zip(group.axes, chosen, strict=True))


def writes(group: PartGroup, layout: Layout, rank: int) -> bool:
    """Whether `rank` is the one that writes its part of `group`: the first of those that hold it."""
    mesh = layout.mesh
    mine = [mesh.coordinate(axis, rank) for axis in group.axes]
    return not any([mesh.coordinate(axis, other) for axis in group.axes] == mine for other in range(rank))


def write_whole(
    folder: Path, groups: Iterable[PartGroup], layout: Layout, tensors: Mapping[str, Tensor]
) -> None:
    """Cut the whole `tensors` into parts and write each into its file below `folder`, one file at a time."""
    for group in groups:
        for coordinates in places_of_group(group, layout):
            part = {name: layout.of(name).local(tensors[name], coordinates) for name in group.tensors}
            write_file(folder / part_file(group, coordinates), part)


def write_part(
    folder: Path, groups: Iterable[PartGroup], layout: Layout, rank: int, tensors: Mapping[str, Tensor]
) -> list[str]:
    """Write the parts that `rank` holds (`tensors`) and no rank before it; gives the files' names."""
    coordinates = layout.mesh.coordinates(rank)
    files = []
    for group in groups:
        if writes(group, layout, rank):
            files.append(part_file(group, coordinates))
            write_file(folder / files[-1], {name: tensors[name] for name in group.tensors})
    return files


def read_part(
    folder: Path, manifest: Manifest, layout: Layout, rank: int, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of `rank`, by the names of the whole ones; no other file is opened. `ArtifactError` names
    a damaged one."""
    coordinates = layout.mesh.coordinates(rank)
    tensors: dict[str, Tensor] = {}
    for group in manifest.parts or []:
        if rank == 0 or not group.idle:
            tensors |= _read(folder, manifest, group, coordinates, device)
    return tensors


def read_whole(folder: Path, manifest: Manifest, layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Every tensor, put together from the parts of all ranks."""
    records = {record.tensor: record for record in manifest.weights}
    tensors: dict[str, Tensor] = {}
    for group in manifest.parts or []:
        for coordinates in places_of_group(group, layout):
            parts = _read(folder, manifest, group, coordinates, device)
            for name, part in parts.items():
                if layout.of(name).splits:
                    _put(tensors, part, records[name], layout.of(name), coordinates)
                else:
                    tensors[name] = part
    return tensors


def _read(
    folder: Path, manifest: Manifest, group: PartGroup, coordinates: Coordinates, device: torch.device
) -> dict[str, Tensor]:
    file = part_file(group, coordinates)
    return read_tensors(require_whole(folder, file, manifest), group.tensors, device)


def _put(
    tensors: dict[str, Tensor],
    part: Tensor,
    record: WeightRecord,
    placement: Placement,
    coordinates: Coordinates,
) -> None:
    """Copy one part to its places in the whole tensor, which the first one makes."""
    if tuple(part.shape) != placement.local_shape(record.shape, coordinates):
        found = f"a part of {list(part.shape)} at {dict(coordinates)}"
        raise ArtifactError(record.name, found, "the shape that its placement says", REBUILD)
    whole = tensors.setdefault(record.tensor, part.new_empty(record.shape))
    for piece in placement.pieces(record.shape, coordinates):
        there = tuple(slice(at, at + n) for at, n in zip(piece.whole, piece.size, strict=True))
        here = tuple(slice(at, at + n) for at, n in zip(piece.start, piece.size, strict=True))
        whole[there] = part[here]
