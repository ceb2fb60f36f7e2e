"""Axes of a mesh: every group is where the arithmetic says, and together the groups hold each rank once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.mesh import ExpertAxes, Mesh


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    """Any mesh of up to 48 ranks, with up to three expert layers."""
    tensor, data = draw(st.sampled_from((1, 2, 3, 4))), draw(st.integers(1, 12))
    world = tensor * data
    layers = []
    for number in range(draw(st.integers(0, 3))):
        slices = draw(st.sampled_from([d for d in range(1, world + 1) if world % d == 0]))
        left = world // slices
        expert = draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
        layers.append((f"moe_{number}", ExpertAxes(left // expert, expert, slices)))
    return Mesh(data, tensor, draw(st.sampled_from((1, 2, 4, 8))), tuple(layers))


@given(meshes())
def test_groups_hold_each_rank_once_and_coordinates_are_places(mesh: Mesh) -> None:
    for axis, size in mesh.axes().items():
        groups = mesh.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
        for group in groups:
            assert len(group) == size
            assert [mesh.coordinate(axis, rank) for rank in group] == list(range(size))
            assert all(mesh.group(axis, rank) == group for rank in group)


@given(meshes())
def test_two_steps_reach_whom_one_exchange_reaches(mesh: Mesh) -> None:
    """Inside the node and then between nodes: the expert axis, in its order, inside fastest."""
    for axes in mesh.expert_axes:
        for rank in range(mesh.world):
            between = mesh.group(axes.between_axis, rank)
            place = mesh.coordinate(axes.inside_axis, rank)
            reached = [other for node in between for other in mesh.group(axes.inside_axis, node)]
            assert tuple(reached) == mesh.group(axes.expert_axis, rank)
            assert all(mesh.coordinate(axes.inside_axis, other) == place for other in between)


@given(meshes())
def test_json_gives_the_same_mesh(mesh: Mesh) -> None:
    assert Mesh.of_json(mesh.to_json()) == mesh


def test_the_paper_s_arrangement() -> None:
    """24B+MoE-128 on 256 GPUs, tensor 8: two ranks share an expert, 8 share a dense layer."""
    axes = ExpertAxes(1, 128, 2)
    mesh = Mesh(32, 8, 8, (("moe_1", axes),))
    assert mesh.group("tensor", 9) == tuple(range(8, 16))
    assert mesh.group("slice_128x2", 9) == (8, 9)
    assert mesh.group("expert_128x2_inside", 9) == (9, 11, 13, 15)
    assert mesh.group("expert_128x2_between", 9)[:3] == (1, 9, 17)
    assert mesh.group("expert_data_128x2", 9) == (9,)


def test_an_axis_that_is_not_there_is_named() -> None:
    with pytest.raises(KeyError, match="no axis 'expert_3'"):
        Mesh(2).group("expert_3", 0)
