"""What there is to try: every divisor, nothing twice, nothing that a plan cannot say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import PlanError
from moec.ir.mesh import ExpertAxes
from moec.plan import Parallel
from moec.planning.arrangements import (
    ExpertLayer,
    Space,
    arrangements,
    divisors,
    effect,
    least_bytes,
    mesh_of,
    ways_of_rows,
)

EXPERTS = st.sampled_from((1, 2, 3, 4, 6, 8, 12, 16))


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    world = draw(st.sampled_from((1, 2, 4, 6, 8, 12, 16)))
    cut = {1: 1} | {ways: draw(st.sampled_from((1, ways))) for ways in divisors(world) if draw(st.booleans())}
    layers = [
        ExpertLayer(f"moe_{i}", number, cut, 64 * number)
        for i, number in enumerate(draw(st.lists(EXPERTS, max_size=3)))
    ]
    node = draw(st.sampled_from((1, 2, 4, 8)))
    return Space(world, tuple(layers), draw(st.sampled_from((0, 1, 4, 6))), Parallel(node=node))


@given(spaces())
def test_every_axis_takes_every_size_it_can(space: Space) -> None:
    found = arrangements(space)
    assert {one.tensor for one in found} == {
        d for d in divisors(space.world) if not space.heads or d <= space.heads
    }
    degrees = {axes.expert for one in found for _, axes in mesh_of(space, one).layers}
    wanted = {d for layer in space.layers for d in divisors(layer.experts) if space.world % d == 0}
    assert degrees == wanted
    assert all(one.data * one.tensor == space.world for one in found)


@given(spaces())
def test_nothing_is_tried_twice_and_nothing_is_left_out(space: Space) -> None:
    found = arrangements(space)
    effects = [effect(space, one) for one in found]
    assert len(set(effects)) == len(effects)
    for one in found:
        for kind in ("flat", "hierarchical", "coordinated", "auto"):
            assert effect(space, one.model_copy(update={"all_to_all": kind})) in effects


@given(spaces())
def test_axes_fill_the_world(space: Space) -> None:
    for one in arrangements(space):
        for _, axes in mesh_of(space, one).layers:
            assert axes.data * axes.expert * axes.slice == space.world
        for shared, _ in ways_of_rows(space, one):
            assert not shared or one.tensor > 1


@given(spaces())
def test_more_parts_hold_fewer_bytes(space: Space) -> None:
    whole = sum(layer.bytes for layer in space.layers)
    for one in arrangements(space):
        most = max((a.expert * a.slice for _, a in mesh_of(space, one).layers), default=1)
        assert whole // most - len(space.layers) <= least_bytes(space, one) <= whole


def test_layers_of_a_pyramid_have_axes_of_their_own() -> None:
    layers = tuple(ExpertLayer(f"moe_{number}", number, {1: 1, 2: 2}) for number in (4, 8))
    space = Space(16, layers, given=Parallel(node=4))
    mesh = mesh_of(space, Parallel(expert=8, slice=2, node=4))
    assert [axes for _, axes in mesh.layers] == [ExpertAxes(2, 4, 2), ExpertAxes(1, 8, 2)]


def test_what_is_fixed_stays() -> None:
    layers = (ExpertLayer("moe_1", 8, {1: 1, 2: 2, 4: 4}),)
    fixed = {"tensor": 2, "slice": 4, "expert": 2, "all_to_all": "flat"}
    (only,) = arrangements(Space(16, layers, given=Parallel(node=4), fixed=fixed))
    assert (only.tensor, only.slice, only.expert, only.all_to_all, only.data) == (2, 4, 2, "flat", 8)


@pytest.mark.parametrize(
    ("fixed", "found"),
    [
        ({"tensor": 16}, "tensor = 16 on 8 ranks"),
        ({"tensor": 3}, "tensor = 3 on 8 ranks"),
        ({"slice": 16}, "slice = 16 on 8 ranks"),
        ({"data": 16}, "data = 16 on 8 ranks"),
        ({"slice": 4}, "slice = 4 of moe_1"),
        ({"tensor": 8}, "tensor = 8 for 4 attention heads"),
        ({"data": 1}, "tensor = 8 for 4 attention heads"),
        ({"data": 2, "tensor": 2}, "data = 2 × tensor = 2 on 8 ranks"),
    ],
)
def test_what_does_not_fit_the_ranks_is_refused(fixed: dict[str, int], found: str) -> None:
    space = Space(8, (ExpertLayer("moe_1", 8, {1: 1, 2: 2}),), heads=4, fixed=fixed)
    with pytest.raises(PlanError) as error:
        arrangements(space)
    assert error.value.found == found
    assert error.value.needed
