"""Any part of any tensor in a folder of safetensors files, whichever ranks wrote it in whatever pieces.

The files are those of torch.distributed.checkpoint's safetensors format, and its reader finds the bytes: only
those that are asked for are read. Nothing is unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moec.errors import ArtifactError
from moec.ir.placement import Piece
from moec.runtime.holding import Part


class PartReader:
    """Reads parts of the tensors in `folder`, whose files must be whole (`require_whole_files`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = HuggingFaceStorageReader(str(folder))
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=False)

    def tensors(self, stem: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """(whole shape, dtype) of every tensor in the files of `stem`: `parameters`, `parameters-00003`, …"""
        found = {}
        for index, place in (self._metadata.storage_data or {}).items():
            if stem_of(Path(place.relative_path).name) == stem:
                told = self._metadata.state_dict_metadata[index.fqn]
                found[index.fqn] = tuple(told.size), told.properties.dtype  # type: ignore[union-attr]
        return found

    def read(self, parts: Mapping[str, Part]) -> None:
        """Fill the tensors of `parts`, by name, in place; `ArtifactError` when some of it was not saved."""
        planner = _Planner(self.folder, parts, self._metadata)
        self._reader.read_data(planner.create_local_plan(), planner).wait()

    def read_wholes(self, stem: str) -> dict[str, Tensor]:
        """Every tensor in the files of `stem`, whole, on the CPU."""
        made = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.tensors(stem).items()}
        self.read({name: Part.whole(tensor) for name, tensor in made.items()})
        return made


def stem_of(name: str) -> str:
    """`parameters` for `parameters-00003-1.safetensors`, a file of some rank, and for
    `parameters.safetensors`."""
    return name.removesuffix(".safetensors").partition("-")[0]


class _Planner(LoadPlanner):
    """Finds out which boxes of which files the pieces of `parts` are."""

    def __init__(self, folder: Path, parts: Mapping[str, Part], metadata: Metadata) -> None:
        self._folder, self._parts, self._metadata = folder, parts, metadata
        self._boxes: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, part in self._parts.items():
            for piece in part.pieces:
                if math.prod(piece.size):
                    self._boxes[name, piece.whole] = part.box(piece)
                    items += self._reads(name, piece)
        return LoadPlan(items)

    def _reads(self, name: str, piece: Piece) -> list[ReadItem]:
        saved: Any = self._metadata.state_dict_metadata.get(name)
        if saved is None:
            raise ArtifactError(str(self._folder), f"no tensor '{name}'", "every tensor of the program")
        wanted = ChunkStorageMetadata(torch.Size(piece.whole), torch.Size(piece.size))
        reads = create_read_items_for_chunk_list(name, saved, [wanted])
        found, needed = sum(math.prod(read.lengths) for read in reads), math.prod(piece.size)
        if found != needed:
            raise ArtifactError(
                str(self._folder),
                f"{name}: {found} of {needed} elements at {list(piece.whole)}",
                "all of them",
            )
        return reads

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        offset = read_item.dest_index.offset
        assert offset is not None
        box = self._boxes[read_item.dest_index.fqn, tuple(offset)]
        spans = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return box[tuple(slice(start, start + length) for start, length in spans)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The tensor was a view of its destination."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Everything was handed to the constructor."""

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("there are tensors alone in these files")
