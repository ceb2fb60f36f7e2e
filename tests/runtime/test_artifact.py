"""Saved programs: what comes back is what went in, and what is damaged, edited or foreign is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from moec.capture.capture import capture
from moec.errors import ArtifactError
from moec.ir import Certificate, Check, Entry, Ledger, Origin, Origins, Program, Source, region_of, regions
from moec.ir.graphs import place
from moec.plan import Plan
from moec.runtime.artifact import fingerprint, load_program, save_program
from moec.testing import NAMED
from tests.ir.hand_made import model
from tests.ir.test_round_trip import assert_identical


def sparse_program() -> Program:
    """A program with everything a manifest records."""
    return Program(
        model((1, 3)),
        source=Source(
            "hand made", 11, max_positions=16, unused={"old.bias": torch.arange(3.0)}, notes=("a",)
        ),
        origins=Origins(
            {
                "moe_1.up.weight": Origin("transformer.h.1.mlp.up.weight", "copy", experts=4),
                "moe_1.router.weight": Origin(None, "fresh"),
                "ffn_0.up.weight": Origin("transformer.h.0.mlp.up.weight"),
            }
        ),
        ledger=Ledger(
            [Entry("transformer.wte.weight", (11, 6), "head", "kept", "the head", "", "gpt.py:60")], ["n"]
        ),
        certificates=(Certificate("lift_experts", "exact", "proved", (Check("logits", 1e-13, 1e-10),)),),
        stage="sparse",
        snapshots={"structured": (dense := model()), "name_structure": dense, "sparse": model((1, 3))},
        plan=Plan.shipped("moe"),
    )


@pytest.fixture
def program() -> Program:
    return sparse_program()


@pytest.fixture
def saved(program: Program, tmp_path: Path) -> Path:
    return save_program(program, tmp_path / "a folder with spaces" / "it's saved")


# what comes back


def test_same_bits_names_and_records(program: Program, saved: Path) -> None:
    loaded = load_program(saved)
    tokens = torch.randint(0, 11, (2, 5))
    for mode in (True, False):
        assert_identical(program.train(mode).run(tokens), loaded.train(mode).run(tokens))
    assert list(loaded.state_dict()) == list(program.state_dict())
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in program.named_parameters()]
    assert loaded.text() == program.text()
    assert fingerprint(loaded) == fingerprint(program)
    assert dict(loaded.origins) == dict(program.origins)
    assert (loaded.ledger.entries, loaded.ledger.notes) == (program.ledger.entries, program.ledger.notes)
    assert loaded.certificates == program.certificates
    assert loaded.plan == program.plan
    assert loaded.stage == "sparse"
    assert loaded.num_parameters(active=True) == program.num_parameters(active=True)
    before, after = regions(program.graph), regions(loaded.graph)
    assert {n: region_of(m) for n, m in before.items()} == {n: region_of(m) for n, m in after.items()}


def test_source_and_idle_state_come_back(program: Program, saved: Path) -> None:
    source = load_program(saved).source
    assert torch.equal(source.unused["old.bias"], torch.arange(3.0))
    assert (source.name, source.max_positions, source.notes) == ("hand made", 16, ("a",))


def test_stages_can_still_be_diffed(program: Program, saved: Path) -> None:
    loaded = load_program(saved)
    assert loaded.diff("structured", "sparse") == program.diff("structured", "sparse")
    assert loaded.text("name_structure").splitlines()[1:] == program.text("name_structure").splitlines()[1:]
    assert len(list((saved / "stages").iterdir())) == 2
    twice = load_program(save_program(loaded, saved))
    assert twice.diff("structured") == program.diff("structured")


def test_a_loaded_program_trains(saved: Path) -> None:
    loaded = load_program(saved)
    logits, terms = loaded.run(torch.randint(0, 11, (2, 5)))
    (logits.square().mean() + terms["balance"]).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def up_of(graph: fx.GraphModule, layer: int) -> nn.Parameter:
    """The first matrix of a dense layer."""
    return graph.get_parameter(f"ffn_{layer}.up.weight")


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    graph = model(layers=2)
    graph.get_submodule("ffn_1.up").register_parameter("weight", up_of(graph, 0))
    program = Program(graph, source=Source("x", 11), origins=Origins({}))
    loaded = load_program(save_program(program, tmp_path / "p"))
    assert up_of(loaded.graph, 1) is up_of(loaded.graph, 0)
    assert len(list(loaded.parameters())) == len(list(graph.parameters()))
    read = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert "ffn_1.up.weight" not in read["weight_files"]["weights.safetensors"]


def test_parameters_over_one_memory_are_refused(tmp_path: Path) -> None:
    graph = model(layers=2)
    shared = nn.Parameter(up_of(graph, 0).detach())
    graph.get_submodule("ffn_1.up").register_parameter("weight", shared)
    with pytest.raises(ArtifactError, match="over the same memory"):
        save_program(Program(graph, source=Source("x", 11), origins=Origins({})), tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_frozen_parameters_and_transient_buffers(program: Program, tmp_path: Path) -> None:
    up_of(program.graph, 0).requires_grad_(False)
    place(program.graph, "tables.cos", torch.randn(4).expand(3, 4), persistent=False)
    loaded = load_program(save_program(program, tmp_path / "p"))
    assert not up_of(loaded.graph, 0).requires_grad
    assert torch.equal(loaded.graph.get_buffer("tables.cos"), program.graph.get_buffer("tables.cos"))
    assert "tables.cos" not in loaded.state_dict()


def test_large_programs_are_split(program: Program, tmp_path: Path) -> None:
    folder = save_program(program, tmp_path / "p", largest_file=1000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"weights-00001-of-{len(files):05d}.safetensors"
    tokens = torch.randint(0, 11, (1, 4))
    assert_identical(load_program(folder).run(tokens), program.run(tokens))


def test_meta_programs_keep_all_but_weights(program: Program, tmp_path: Path, saved: Path) -> None:
    hollow = load_program(saved, device="meta")
    assert {parameter.device.type for parameter in hollow.parameters()} == {"meta"}
    again = load_program(save_program(hollow, tmp_path / "hollow"))
    assert not list((tmp_path / "hollow").glob("*.safetensors"))
    assert again.num_parameters() == program.num_parameters()
    assert again.text() == program.text()


@pytest.mark.parametrize("family", ["gpt2_like", "llama_like", "bloom_like"])
def test_captured_models_come_back(family: str, tmp_path: Path) -> None:
    program = capture(NAMED[family].build(0))
    loaded = load_program(save_program(program, tmp_path / "p"), trust=True)  # captured: may write in place
    tokens = torch.randint(0, 7, (2, 5))
    assert torch.equal(loaded.eval()(tokens), program.eval()(tokens))
    assert loaded.text() == program.text()
    assert list(loaded.state_dict()) == list(program.state_dict())


def test_the_training_flag_comes_back(program: Program, tmp_path: Path) -> None:
    assert not load_program(save_program(program.eval(), tmp_path / "p")).training


def test_the_class_asked_for_is_built(saved: Path) -> None:
    class Mine(Program):
        """A program with more verbs."""

    assert type(load_program(saved, kind=Mine)) is Mine


# what saving leaves alone


def test_saving_replaces_a_saved_program_and_nothing_else(
    program: Program, saved: Path, tmp_path: Path
) -> None:
    save_program(program, saved)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match="something else"):
        save_program(program, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_failed_save_leaves_the_old_one(
    program: Program, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (saved / "manifest.json").read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("moec.runtime.artifact.write_tensors", fail)
    with pytest.raises(OSError, match="disk is full"):
        save_program(program, saved)
    assert (saved / "manifest.json").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_plan_of_another_kind_is_refused(program: Program, tmp_path: Path) -> None:
    program.plan = {"moe": {}}
    with pytest.raises(ArtifactError, match=r"moec\.Plan"):
        save_program(program, tmp_path / "p")


# damage


def cut_weights(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def change_a_weight(folder: Path) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit_text(folder: Path) -> None:
    path = folder / "program.py"
    path.write_text(path.read_text().replace("gelu(h)", 'gelu(h, approximate="tanh")'))


def edit_manifest(folder: Path) -> None:
    change(folder, lambda data: data["origins"].clear(), sealed=False)


def cut_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-200])


def change(folder: Path, edit: Callable[[dict[str, Any]], Any], *, sealed: bool = True) -> None:
    """Edit the manifest, and seal it again as a forger would."""
    from moec.runtime.manifest import _seal

    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    seal = data.pop("seal")
    edit(data)
    path.write_text(json.dumps(data | {"seal": _seal(data) if sealed else seal}))


DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (cut_weights, "cut short"),
    (change_a_weight, "edited after saving"),
    (edit_text, r"edited after saving(.|\n)*trust=True"),
    (edit_manifest, r"edited manifest(.|\n)*trust=True"),
    (cut_manifest, "not the JSON that was written"),
    (lambda folder: (folder / "weights.safetensors").unlink(), "no such file"),
    (lambda folder: (folder / "program.py").unlink(), "no such file"),
    (lambda folder: (folder / "manifest.json").unlink(), r"no manifest\.json"),
    (lambda folder: next((folder / "stages").iterdir()).unlink(), "no such file"),
    (shutil.rmtree, "no such folder"),
    (lambda folder: change(folder, lambda data: data.update(version=2)), r"version 2(.|\n)*version 1"),
    (lambda folder: change(folder, lambda data: data.update(format="other")), "format 'other'"),
    (lambda folder: change(folder, lambda data: data.pop("weights")), "weights: Field required"),
    (lambda folder: change(folder, lambda data: data.update(extra=1)), "extra"),
    (lambda folder: change(folder, lambda data: data["stages"].update(x="../../secret.py")), "stages"),
    (lambda folder: change(folder, lambda data: data["weights"].pop()), "differ|reads"),
    (lambda folder: change(folder, lambda data: data["weights"][0].update(shape=[1])), r"\[1\]"),
    (lambda folder: change(folder, lambda data: data["weights"][0].update(dtype="load")), "dtype 'load'"),
    (lambda folder: change(folder, lambda data: data["weights"][0].update(name="forward")), "reads|forward"),
    (lambda folder: change(folder, lambda data: data["ledger"][0].pop("shape")), "records that do not fit"),
    (lambda folder: change(folder, lambda data: data["certificates"].append({})), "records that do not fit"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_damage_is_named(damage: Callable[[Path], Any], reason: str, saved: Path) -> None:
    damage(saved)
    with pytest.raises(ArtifactError, match=reason):
        load_program(saved)


@pytest.mark.parametrize("damage", [cut_weights, change_a_weight])
def test_trust_does_not_cover_weights(damage: Callable[[Path], Any], saved: Path) -> None:
    damage(saved)
    with pytest.raises(ArtifactError):
        load_program(saved, trust=True)


def test_an_edited_text_is_taken_on_trust(program: Program, saved: Path) -> None:
    edit_text(saved)
    loaded = load_program(saved, trust=True)
    assert 'gelu(h, approximate="tanh")' in loaded.text()
    assert not torch.equal(loaded(torch.tensor([[1, 2]])), program(torch.tensor([[1, 2]])))


@pytest.mark.parametrize("trust", [False, True])
def test_code_in_the_text_is_never_run(saved: Path, tmp_path: Path, trust: bool) -> None:
    from moec.runtime.manifest import record_of

    mark = tmp_path / "was here"
    path = saved / "program.py"
    path.write_text(f"open({str(mark)!r}, 'w')\n" + path.read_text())
    record = record_of(path).model_dump()
    change(saved, lambda data: data["files"].update({"program.py": record}))
    with pytest.raises(ArtifactError, match=r"program\.py:1"):
        load_program(saved, trust=trust)
    assert not mark.exists()
