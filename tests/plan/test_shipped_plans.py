"""The plans that come with moec say what their comments say, on models of any depth."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import PlanError
from moec.plan import LayerSettings, Plan
from moec.plan.depth import kept_layers
from moec.plan.shipped import shipped_text

NAMES = ["moe", "mos", "pr_moe", "pr_mos", "pyramid_moe", "residual_moe", "upcycle"]


def layers_of(plan: Plan, depth: int) -> dict[int, LayerSettings]:
    return plan.layer_settings(depth, [f"h.{layer}.mlp" for layer in range(depth)])


def test_the_names() -> None:
    assert Plan.shipped_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
@given(depth=st.integers(2, 60))
def test_each_selects_every_other_layer_of_any_model(name: str, depth: int) -> None:
    assert sorted(layers_of(Plan.shipped(name), depth)) == list(range(1, depth, 2))


@pytest.mark.parametrize("name", NAMES)
def test_each_survives_toml_and_explains_itself(name: str) -> None:
    plan = Plan.resolve(name)
    assert Plan.from_text(plan.to_toml()) == plan
    rows = shipped_text(name).splitlines()
    assert sum("#" in row for row in rows) >= 5


def test_the_papers_expert_counts_on_24_layers() -> None:
    experts = {
        name: [layer.experts for layer in layers_of(Plan.shipped(name), 24).values()] for name in NAMES
    }
    assert experts["moe"] == experts["mos"] == [128] * 12
    assert experts["residual_moe"] == [32] * 12
    assert experts["pyramid_moe"] == experts["pr_moe"] == experts["pr_mos"] == [32] * 10 + [64] * 2
    assert experts["upcycle"] == [8] * 12


@pytest.mark.parametrize("name", [name for name in NAMES if name != "upcycle"])
def test_the_papers_settings(name: str) -> None:
    for layer in layers_of(Plan.shipped(name), 6).values():
        assert (layer.top_k, layer.gate, layer.train_capacity, layer.eval_capacity) == (
            1,
            "probability",
            1.0,
            1.0,
        )
        assert (layer.min_capacity, layer.balance_weight, layer.random_token_selection) == (4, 0.01, True)
        assert layer.residual == ("learned" if name in ("residual_moe", "pr_moe", "pr_mos") else "none")


@pytest.mark.parametrize(("name", "teacher"), [("mos", "moe"), ("pr_mos", "pr_moe")])
def test_a_student_is_its_teacher_with_fewer_layers(name: str, teacher: str) -> None:
    """The same [moe], the paper's depth, and a teacher that falls silent before the end."""
    plan = Plan.shipped(name)
    assert plan.moe == Plan.shipped(teacher).moe
    assert plan.student is not None
    assert plan.distill is not None
    assert (plan.student.depth, plan.student.init) == (21, "teacher")
    assert (plan.distill.alpha, plan.distill.temperature, plan.distill.direction) == (1.0, 1.0, "forward")
    assert 0.5 < plan.distill.stop < 1.0
    experts = [layer.experts for layer in layers_of(plan, 21).values()]
    assert experts == ([128] * 10 if name == "mos" else [32] * 8 + [64] * 2)
    kept = kept_layers(plan.student, 24)
    assert set(range(24)) - set(kept) == {4, 11, 19}


@pytest.mark.parametrize("name", ["mos", "pr_mos"])
def test_a_teacher_with_too_few_layers_is_told(name: str) -> None:
    student = Plan.shipped(name).student
    assert student is not None
    with pytest.raises(PlanError) as caught:
        kept_layers(student, 4)
    assert str(caught.value) == (
        "student.depth\n  found   depth = 21, the teacher has 4 layers\n  needed  fewer\n  nearest depth = 3"
    )


def test_upcycling_keeps_the_function() -> None:
    for layer in layers_of(Plan.shipped("upcycle"), 6).values():
        assert (layer.init, layer.gate, layer.residual) == ("copy", "straight-through", "none")
        assert (layer.train_capacity, layer.eval_capacity) == (0.0, 0.0)


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(PlanError) as caught:
        Plan.resolve("pyramid")
    assert str(caught.value) == (
        "plan\n"
        "  found   no shipped plan 'pyramid'\n"
        "  needed  a shipped plan (moe, mos, pr_moe, pr_mos, pyramid_moe, residual_moe, upcycle) "
        "or the path of a .toml file\n"
        "  nearest 'pyramid_moe'"
    )


def test_the_example_plan_fits_the_example_model() -> None:
    plan = Plan.from_toml(Path(__file__).parents[2] / "examples" / "pr_moe.toml")
    layers = layers_of(plan, 4)
    assert {site: (layer.experts, layer.residual) for site, layer in layers.items()} == {
        1: (4, "learned"),
        3: (8, "learned"),
    }
