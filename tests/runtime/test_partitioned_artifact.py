"""Placed programs on disk: every rank writes and reads its own bytes, and what comes back is what went in."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import moec
from examples.gpt import GPT, GPTConfig
from moec.errors import ArtifactError
from moec.ir.bind import bind
from moec.local_program import LocalProgram
from moec.runtime.manifest import read_manifest
from moec.runtime.manifest_records import layout_of
from moec.runtime.part_files import part_file
from moec.runtime.partitioned import save_part
from moec.runtime.simulated import run_ranks
from moec.runtime.weights import write_file
from tests.runtime.ranks import run_processes
from tests.runtime.test_artifact import change

WORLD = 4
MOE = {
    "layers": "all", "experts": 4, "residual": "learned", "gate": "straight-through",
    "override": [{"layers": "-1:", "experts": 8}],
}  # fmt: skip
PLANS = {
    "experts": {"moe": MOE, "parallel": {"expert": 4}},
    "slices": {"moe": MOE, "parallel": {"expert": 2, "slice": 2}},
    "tensor": {"moe": MOE, "parallel": {"tensor": 2, "expert": 4}},
}


def dense() -> GPT:
    """A GPT with tied embeddings and state that its forward never reads."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(vocab=37, seq=16, layers=2, width=16, heads=4, dropout=0.0))
    model.register_buffer("idle", torch.arange(3.0))
    return model


def placed(plan: str) -> moec.Program:
    """The model on 4 ranks, no two experts alike."""
    program = moec.compile(dense(), PLANS[plan], world=WORLD, verify="off")
    for value in program.parameters():
        value.data.add_(torch.randn_like(value), alpha=0.02)
    return program


@pytest.fixture(scope="module", params=["slices", "tensor"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[moec.Program, Path]:
    """A placed program and the folder it was saved in, which no test changes."""
    program = placed(request.param)
    return program, program.save(tmp_path_factory.mktemp("kept") / "saved")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return placed("experts").save(tmp_path_factory.mktemp("kept") / "saved")


@pytest.fixture
def saved(kept: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(kept, tmp_path / "saved"))


def same_bits(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """The same names in the same order, and the same bits."""
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


# what comes back


def test_the_whole_comes_back(pair: tuple[moec.Program, Path]) -> None:
    program, folder = pair
    loaded = moec.load(folder)
    tokens = torch.randint(0, 37, (4, 6))
    assert torch.equal(loaded(tokens), program(tokens))
    assert same_bits(loaded.state_dict(), program.state_dict())
    assert loaded.text() == program.text()
    assert (loaded.stage, loaded.layout) == ("placed", program.layout)
    assert loaded.fingerprint() == program.fingerprint()
    assert torch.equal(loaded.source.unused["idle"], torch.arange(3.0))
    assert loaded.diff("sparse", "placed") == program.diff("sparse", "placed")


def test_every_rank_comes_back(pair: tuple[moec.Program, Path]) -> None:
    program, folder = pair
    for rank in (0, 3):
        made, loaded = program.partition(rank), moec.load(folder, rank=rank)
        assert isinstance(loaded, LocalProgram)
        assert same_bits(loaded.state_dict(), made.state_dict())
        assert list(dict(loaded.named_parameters())) == list(dict(made.named_parameters()))
        assert loaded.text() == made.text()
        assert (loaded.rank, loaded.stage, loaded.layout) == (rank, made.stage, program.layout)
        assert (loaded.placements(), loaded.whole_shapes()) == (made.placements(), made.whole_shapes())
        assert loaded.fingerprint() == made.fingerprint() == program.fingerprint()
        assert dict(loaded.origins) == dict(made.origins)
        assert loaded.ledger.notes == made.ledger.notes
        assert loaded.moe_settings() == made.moe_settings()
        assert loaded.expert_parameter_names() == made.expert_parameter_names()
        assert (loaded.whole.text(), loaded.whole.stage) == (program.text(), "placed")


def test_loaded_ranks_compute_the_same_bits(pair: tuple[moec.Program, Path]) -> None:
    program, folder = pair
    assert program.layout is not None
    tokens = torch.randint(0, 37, (4, 6))

    def step(local: moec.Program) -> dict[str, Tensor]:
        assert isinstance(local, LocalProgram)
        mesh = local.layout.mesh
        own = tokens.tensor_split(mesh.data)[mesh.coordinate("data", local.rank)]
        local.loss_terms(own)["loss"].backward()  # type: ignore[no-untyped-call]
        return {name: value.grad for name, value in local.named_parameters() if value.grad is not None}

    made = run_ranks(program.layout.mesh, lambda rank: step(program.partition(rank)))
    loaded = run_ranks(program.layout.mesh, lambda rank: step(moec.load(folder, rank=rank)))
    assert all(same_bits(mine, theirs) for mine, theirs in zip(made, loaded, strict=True))
    assert len(made[0]) == len(list(program.partition(0).parameters()))


def test_the_text_of_a_rank_runs(pair: tuple[moec.Program, Path]) -> None:
    """With `bind`, which is what one sets breakpoints with."""
    program, folder = pair
    assert program.layout is not None
    spec = importlib.util.spec_from_file_location("partition", folder / "partition.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokens = torch.randint(0, 37, (1, 6))

    def differs(rank: int) -> bool:
        local = moec.load(folder, rank=rank).eval()
        by_text = bind(vars(module), local.graph)(tokens)[0]
        return not torch.equal(by_text, local.run(tokens)[0])

    assert not any(run_ranks(program.layout.mesh, differs))


# a rank's own bytes


def own_files(folder: Path, rank: int) -> set[str]:
    """The files of parts that `rank` needs, by the manifest."""
    manifest = read_manifest(folder, trust=False)
    layout = layout_of(manifest)
    assert layout is not None
    coordinates = layout.mesh.coordinates(rank)
    return {part_file(group, coordinates) for group in manifest.parts or [] if rank == 0 or not group.idle}


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_needs_no_other_files(pair: tuple[moec.Program, Path], rank: int, tmp_path: Path) -> None:
    program, folder = pair
    own = own_files(folder, rank)
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    for path in (alone / "parts").iterdir():
        if f"parts/{path.name}" not in own:
            path.unlink()
    made = program.partition(rank)
    assert same_bits(moec.load(alone, rank=rank).state_dict(), made.state_dict())
    held = sum(value.nbytes for value in made.state_dict().values())
    held += sum(value.nbytes for value in made.source.unused.values()) if rank == 0 else 0
    assert sum(map(data_bytes, (alone / "parts").iterdir())) == held
    with pytest.raises(ArtifactError, match="no such file"):
        moec.load(alone)


def data_bytes(path: Path) -> int:
    """The bytes of tensors in a file, without its header."""
    with safe_open(path, framework="pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (no mapping)


def test_every_byte_is_written_once(pair: tuple[moec.Program, Path]) -> None:
    program, folder = pair
    whole = [*program.state_dict().values(), *program.source.unused.values()]
    assert sum(map(data_bytes, (folder / "parts").iterdir())) == sum(value.nbytes for value in whole)
    assert not list(folder.glob("*.safetensors"))


def test_large_parts_lie_in_several_files(tmp_path: Path) -> None:
    from moec.runtime.artifact import save_program

    program = placed("slices")
    folder = save_program(program, tmp_path / "p", local=program.partition(0), largest_file=2000)
    assert len(list((folder / "parts").glob("whole.*-of-*.safetensors"))) > 2
    assert same_bits(moec.load(folder).state_dict(), program.state_dict())
    assert same_bits(moec.load(folder, rank=3).state_dict(), program.partition(3).state_dict())


# saved by the ranks of a job


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def comparable(folder: Path) -> dict[str, Any]:
    """What is in a folder, its manifest without the seconds that passes took."""
    files: dict[str, Any] = contents(folder)
    manifest = json.loads(files.pop("manifest.json"))
    for sheet in (manifest, manifest["partition"]):
        for certificate in sheet["certificates"]:
            del certificate["seconds"]
    del manifest["seal"]
    return {**files, "manifest.json": manifest}


def test_ranks_save_together_what_the_whole_saves(pair: tuple[moec.Program, Path], tmp_path: Path) -> None:
    program, folder = pair
    assert program.layout is not None
    run_ranks(program.layout.mesh, lambda rank: program.partition(rank).save(tmp_path / "together"))
    assert comparable(tmp_path / "together") == comparable(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["together"]


def test_loaded_ranks_save_again(pair: tuple[moec.Program, Path], tmp_path: Path) -> None:
    program, folder = pair
    assert program.layout is not None
    run_ranks(program.layout.mesh, lambda rank: moec.load(folder, rank=rank).save(tmp_path / "again"))
    assert comparable(tmp_path / "again") == comparable(folder)


def load_and_save(saved: str, folder: str, rank: int) -> str:
    """Where a rank that is a process saved the part that it had loaded."""
    return str(moec.load(saved, rank=rank).save(folder))


def test_processes_save_together(tmp_path: Path, kept: Path) -> None:
    layout = layout_of(read_manifest(kept, trust=False))
    assert layout is not None
    # Arguments, not the environment: processes may come from a server that was started earlier.
    run_processes(layout.mesh, functools.partial(load_and_save, str(kept), str(tmp_path / "together")))
    assert comparable(tmp_path / "together") == comparable(kept)


def test_a_rank_that_fails_leaves_the_old_folder(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program, before = placed("experts"), contents(saved)
    assert program.layout is not None

    def fail(path: Path, tensors: Any) -> None:
        if "expert_4-2" in path.name:
            raise OSError("the disk is full")
        write_file(path, tensors)

    monkeypatch.setattr("moec.runtime.part_files.write_file", fail)

    def told(rank: int) -> str:
        with pytest.raises(Exception) as caught:  # noqa: PT011 (each rank's own)
            program.partition(rank).save(saved)
        return str(caught.value)

    errors = run_ranks(program.layout.mesh, told)
    assert errors[2] == "the disk is full"
    assert all("rank 2" in error and "disk is full" in error for error in (errors[0], errors[1], errors[3]))
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_parts_on_meta_are_not_saved_by_ranks(tmp_path: Path) -> None:
    with torch.device("meta"):
        hollow = GPT(GPTConfig(vocab=37, seq=16, layers=2, width=16, heads=4))
    program = moec.compile(hollow, PLANS["experts"], world=WORLD)
    local = program.partition(1)
    with pytest.raises(ArtifactError, match="rank 1 is on meta"):
        save_part(local, local.whole, tmp_path / "p")
    again = moec.load(program.save(tmp_path / "p"), rank=1)
    assert {value.device.type for value in again.parameters()} == {"meta"}
    assert again.text() == local.text()


# damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def part_of_rank_2(folder: Path) -> Path:
    return next((folder / "parts").glob("expert_4-2.safetensors"))


def swap_parts(folder: Path) -> None:
    shutil.copy(folder / "parts" / "expert_4-1.safetensors", part_of_rank_2(folder))


def edit_text(folder: Path) -> None:
    path = folder / "partition.py"
    path.write_text(path.read_text().replace("gelu(h)", 'gelu(h, approximate="tanh")'))


def mix_with_another_plan(folder: Path) -> None:
    """The text of a program that was compiled since."""
    shutil.copy(placed("slices").save(folder.parent / "other") / "partition.py", folder / "partition.py")


def move_an_axis(folder: Path) -> None:
    change(folder, lambda data: data["groups"].update(expert_4=[0, 2, 1, 3]))


def cut_part(folder: Path) -> None:
    path = part_of_rank_2(folder)
    path.write_bytes(path.read_bytes()[:-9])


DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: flip(part_of_rank_2(folder)), r"expert_4-2(.|\n)*edited after saving"),
    (cut_part, r"expert_4-2(.|\n)*cut short"),
    (lambda folder: part_of_rank_2(folder).unlink(), r"expert_4-2(.|\n)*no such file"),
    (swap_parts, r"expert_4-2(.|\n)*edited after saving"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_a_damaged_part_is_named_by_the_ranks_that_read_it(
    damage: Callable[[Path], Any], reason: str, saved: Path
) -> None:
    damage(saved)
    with pytest.raises(ArtifactError, match=reason) as caught:
        moec.load(saved, rank=2)
    assert f"world=4).save('{saved}')" in str(caught.value)
    with pytest.raises(ArtifactError, match=reason):
        moec.load(saved)
    assert moec.load(saved, rank=1).rank == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("damage", [edit_text, mix_with_another_plan])
def test_an_edited_or_stale_text_is_refused(damage: Callable[[Path], Any], saved: Path) -> None:
    damage(saved)
    with pytest.raises(ArtifactError, match=r"partition\.py(.|\n)*edited after saving(.|\n)*trust=True"):
        moec.load(saved, rank=0)


def test_an_edited_text_is_taken_on_trust(saved: Path) -> None:
    edit_text(saved)
    assert 'gelu(h, approximate="tanh")' in moec.load(saved, rank=0, trust=True).text()


def test_other_groups_are_refused(saved: Path) -> None:
    move_an_axis(saved)
    for load in (lambda: moec.load(saved, rank=0), lambda: moec.load(saved)):
        with pytest.raises(ArtifactError, match=r"expert_4 with the ranks \[0, 2, 1, 3\]"):
            load()


def test_a_text_that_now_means_something_else_is_refused(saved: Path) -> None:
    """As it would when another moec reads an operator or the plan in another way."""
    change(saved, lambda data: data.update(plan=data["plan"].replace("experts = 4", "experts = 2")))
    with pytest.raises(ArtifactError, match=r"another way(.|\n)*world=4\)\.save"):
        moec.load(saved)


def test_ranks_that_are_not_there(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"rank 4(.|\n)*from 0 to 3"):
        moec.load(saved, rank=4)
    single = moec.compile(dense(), PLANS["experts"], world=1, verify="off").save(tmp_path / "single")
    with pytest.raises(ArtifactError, match=r"one process(.|\n)*world=N"):
        moec.load(single, rank=0)
