"""A mesh with a name: its axes in the graph, on weights and in remarks, and nothing else of the program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moec.errors import MeshError, PassError
from moec.ir.graphs import graph_modules
from moec.ir.mesh import WORLD, ExpertAxes, Mesh
from moec.passes.name_axes import ARGUMENTS, NameAxes
from moec.passes.runner import Runner
from moec.runtime.simulated import run_ranks
from tests.runtime.taught_runs import VOCABULARY, teacher_of

PLACED = {"tensor": 2, "expert": 2}


def axes_in(program: object) -> set[str]:
    """The axes that the calls of a graph name."""
    found = set()
    for _, module in graph_modules(program.graph):  # type: ignore[attr-defined]
        for node in module.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            names = [argument.name for argument in schema.arguments] if schema else []
            given = dict(zip(names, node.args, strict=False)) | node.kwargs
            found |= {str(given[name]) for name in ARGUMENTS if given.get(name)}
    return found


def bare(text: str) -> str:
    """A text without its spaces, and without the numbers of sizes that are data."""
    return re.sub(r"\s+", "", re.sub(r"\bu\d+\b", "u", text))


def test_every_axis_has_the_name_and_nothing_else_changes() -> None:
    plain = teacher_of(4, **PLACED).partition(0)
    before = str(plain)
    named = plain.named("teacher")
    assert axes_in(plain) == {"tensor", "expert_2", WORLD}
    assert axes_in(named) == {axis if axis == WORLD else f"teacher_{axis}" for axis in axes_in(plain)}
    assert str(plain) == before, "the pass worked on its input"
    assert bare(str(named).replace("teacher_", "")) == bare(before)
    for name, value in named.named_parameters():
        assert value is dict(plain.named_parameters())[name]
    assert {split.axis for one in named.placements().values() for split in one.splits} == {
        "teacher_tensor", "teacher_expert_2",
    }  # fmt: skip
    assert named.fingerprint() == plain.fingerprint()


def test_it_computes_what_it_did_beside_another_program() -> None:
    """Both at once, each over its own axes: the loss, which counts positions over the data axis, too."""
    one, other = teacher_of(4, **PLACED), teacher_of(4, expert=4)
    assert one.layout is not None
    assert other.layout is not None
    tokens = torch.randint(VOCABULARY, (4, 6))
    mesh = other.layout.mesh.joined(one.layout.mesh.named("teacher"))

    def body(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        named, plain = one.partition(rank).named("teacher"), other.partition(rank)
        return named.loss(tokens.tensor_split(2)[rank // 2]), plain.loss(tokens.tensor_split(4)[rank])

    shares = run_ranks(mesh, body)
    for program, found in zip((one, other), zip(*shares, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(found).sum(), program.loss(tokens), rtol=1e-10, atol=0.0)


def test_refusals(tmp_path: Path) -> None:
    plain = teacher_of(4, **PLACED).partition(0)
    named = plain.named("teacher")
    with pytest.raises(PassError, match="a mesh called 'teacher'"):
        named.named("another")
    with pytest.raises(PassError, match="axes are called teacher_"):
        named.save(tmp_path / "saved")
    with pytest.raises(PassError, match="without a mesh"):
        Runner(verify="off").run(teacher_of(), [NameAxes("teacher")])


def test_meshes_that_are_joined() -> None:
    student = Mesh(4, 1, layers=(("moe_1", ExpertAxes(1, 4)),))
    teacher = Mesh(2, 2, layers=(("moe_1", ExpertAxes(2, 2)),)).named("teacher")
    both = student.joined(teacher)
    assert both.group("teacher_tensor", 3) == (2, 3)
    assert both.group("tensor", 3) == (3,)
    assert both.group("teacher_expert_2", 3) == (2, 3)
    assert both.coordinate("data", 3) == 3
    assert teacher.coordinate("data", 3) == teacher.coordinate("teacher_data", 3) == 1
    assert (both.data, both.tensor, both.world) == (4, 1, 4)
    assert both.to_json() == student.to_json()
    alike = student.joined(Mesh(4, 1, layers=(("moe_0", ExpertAxes(2, 2)),)))
    assert alike.group("expert_2", 3) == (2, 3), "axes of one name that mean the same are one axis"
    with pytest.raises(MeshError, match="axes that can be told apart"):
        student.joined(teacher.named(""))
    with pytest.raises(MeshError, match="over the same ranks"):
        student.joined(Mesh(8).named("teacher"))
