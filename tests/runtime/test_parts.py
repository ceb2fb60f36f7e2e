"""Files of the ranks of one mesh hold every part that a rank of another one needs, and no more is read."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from moec.errors import ArtifactError
from moec.ir.mesh import ExpertAxes, Mesh
from moec.ir.placement import Placement, Split
from moec.runtime.checkpoint import _write_files
from moec.runtime.holding import Part
from moec.runtime.parts import PartReader, stem_of
from moec.runtime.ranks import Ranks

SHAPE = (12, 5, 6)
WHOLE = torch.arange(360.0).view(SHAPE)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Mesh, Placement]:
    """A mesh, and a weight of `SHAPE` split over some of its axes, in blocks or unevenly."""
    data, tensor = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    blocks = draw(st.sampled_from([(6,), (2, 4), (3, 3), (1, 2, 3)]))
    splits = (Split(2, "tensor", tensor, blocks),) if draw(st.booleans()) else ()
    if draw(st.booleans()):
        axes = ExpertAxes(tensor, data)
        mesh = Mesh(data, tensor, layers=(("moe_0", axes),))
        return mesh, Placement((Split(0, axes.expert_axis, data, (12,)),), axes.data_axis)
    return Mesh(data, tensor), Placement(splits, "data" if splits else "world")


def write(folder: Path, mesh: Mesh, placement: Placement) -> None:
    """What every rank saves of `WHOLE`, the first of its holders."""
    for rank in range(mesh.world):
        if mesh.coordinate(placement.holders, rank) == 0:
            _write_files(folder, {"parameters": {"w": part(mesh, placement, rank)}}, Ranks(mesh, rank))


def part(mesh: Mesh, placement: Placement, rank: int, fill: float | None = None) -> Part:
    where = mesh.coordinates(rank)
    local = placement.local(WHOLE, where).clone()
    pieces = tuple(placement.pieces(SHAPE, where))
    return Part(local if fill is None else torch.full_like(local, fill), SHAPE, pieces)


@given(layouts(), layouts())
def test_any_mesh_reads_what_any_mesh_wrote(
    tmp_path_factory: pytest.TempPathFactory, wrote: tuple[Mesh, Placement], reads: tuple[Mesh, Placement]
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    write(folder, *wrote)
    reader = PartReader(folder)
    assert reader.tensors("parameters") == {"w": (SHAPE, torch.float32)}
    for rank in range(reads[0].world):
        wanted = part(*reads, rank, fill=-1.0)
        reader.read({"w": wanted})
        assert torch.equal(wanted.tensor, part(*reads, rank).tensor)
    assert torch.equal(reader.read_wholes("parameters")["w"], WHOLE)


SPLIT = Mesh(tensor=3), Placement((Split(2, "tensor", 3, (3, 3)),), "data")


def test_the_files_are_those_of_torch(tmp_path: Path) -> None:
    write(tmp_path, *SPLIT)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"parameters-{rank:05d}{piece}.safetensors" for rank in range(3) for piece in ("-1", "")
    ]  # fmt: skip
    whole = {"w": torch.empty(SHAPE)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.distributed is not initialised
        dcp.load(whole, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(whole["w"], WHOLE)


def test_only_the_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *SPLIT)
    read: list[int] = []
    process = HuggingFaceStorageReader._process_read_request

    def counted(self: HuggingFaceStorageReader, file: object, item: ReadItem, planner: LoadPlanner) -> None:
        read.append(torch.Size(item.lengths).numel())
        process(self, file, item, planner)

    monkeypatch.setattr(HuggingFaceStorageReader, "_process_read_request", counted)
    mesh, placement = Mesh(tensor=2), Placement((Split(0, "tensor", 2, (12,)),), "data")
    PartReader(tmp_path).read({"w": part(mesh, placement, 1, fill=0.0)})
    assert sum(read) == WHOLE.numel() // 2


def test_numbers_without_a_shape(tmp_path: Path) -> None:
    _write_files(tmp_path, {"optimizer": {"w/step": torch.tensor(7.0)}}, Ranks())
    value: Tensor = torch.zeros(())
    PartReader(tmp_path).read({"w/step": Part.whole(value)})
    assert value.item() == 7.0


def test_what_was_not_saved_is_named(tmp_path: Path) -> None:
    write(tmp_path, *SPLIT)
    with pytest.raises(ArtifactError, match="no tensor 'other'"):
        PartReader(tmp_path).read({"other": Part.whole(torch.zeros(SHAPE))})
    (tmp_path / "parameters-00001-1.safetensors").unlink()
    with pytest.raises(ArtifactError, match="w: 300 of 360 elements"):
        PartReader(tmp_path).read({"w": Part.whole(torch.zeros(SHAPE))})


def test_stems() -> None:
    names = ("random.safetensors", "random-00003.safetensors", "random-00003-1.safetensors")
    assert {stem_of(name) for name in names} == {"random"}
