"""The plan as a value: round trips, Python's door, and the settings of each layer."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moec.errors import PlanError
from moec.plan import Compile, Distill, Layers, LayerSettings, Moe, Override, Parallel, Plan, Student, Train

selectors = st.sampled_from(["all", "1::2", "-2:", "depth>=0.5", "*.h.1?.mlp", 3, [0, -1]])
shares = st.floats(0.0, 1.0)
positive = st.floats(1e-9, 1e9)
capacity = st.just("dropless") | positive
layer_fields: dict[str, st.SearchStrategy[Any]] = {
    "residual": st.sampled_from(["none", "sum", "learned"]),
    "capacity_factor": capacity,
    "eval_capacity_factor": st.just("train") | capacity,
    "min_capacity": st.integers(0, 99),
    "random_token_selection": st.booleans(),
    "gate": st.sampled_from(["straight-through", "probability", "normalized", "sigmoid"]),
    "noise": st.sampled_from(["none", "jitter", "rsample"]),
    "jitter": st.floats(1e-6, 1.0),
    "balance": st.sampled_from(["loss", "bias"]),
    "balance_loss": shares,
    "bias_rate": shares,
    "z_loss": shares,
    "init": st.sampled_from(["copy", "noise", "partial", "split", "fresh"]),
    "init_noise": shares,
    "init_ratio": st.floats(1e-6, 1.0),
    "router_std": shares,
}
counts = {"experts": st.integers(8, 64), "top_k": st.integers(1, 8)}
overrides = st.builds(
    lambda layers, experts, rest: {"layers": layers, "experts": experts, **rest},
    selectors,
    counts["experts"],
    st.fixed_dictionaries({}, optional={**layer_fields, "top_k": counts["top_k"]}),
)
moes = st.fixed_dictionaries(
    {"layers": selectors, "experts": counts["experts"]},
    optional={
        **layer_fields,
        "top_k": counts["top_k"],
        "seed": st.integers(0, 2**40),
        "override": st.lists(overrides, max_size=3),
    },
)
trains = st.fixed_dictionaries(
    {},
    optional={
        "steps": st.integers(200, 10**9),
        "lr": st.floats(0.01, 1.0),
        "min_lr": st.floats(0.0, 0.001),
        "betas": st.lists(st.floats(0.0, 0.999), min_size=2, max_size=2),
        "dtype": st.sampled_from(["fp32", "bf16"]),
    },
)
plans = st.fixed_dictionaries(
    {},
    optional={
        "moe": moes,
        "student": st.builds(lambda n: {"depth": n}, st.integers(1, 40)) | st.just({"keep": [0, 2, 5]}),
        "distill": st.fixed_dictionaries({}, optional={"alpha": positive, "stop": shares}),
        "parallel": st.fixed_dictionaries({}, optional={"data": st.just("auto") | st.integers(1, 9)}),
        "train": trains,
        "compile": st.fixed_dictionaries({}, optional={"verify": st.sampled_from(["auto", "off", "full"])}),
    },
)


@given(plans)
def test_a_plan_survives_toml(values: dict[str, Any]) -> None:
    plan = Plan.resolve(values)
    again = Plan.from_text(plan.to_toml())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_toml() == plan.to_toml()


@given(plans)
def test_a_plan_survives_its_own_dump_and_pickling(values: dict[str, Any]) -> None:
    plan = Plan.resolve(values)
    assert Plan.resolve(plan.model_dump()) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


@given(plans)
def test_values_stand_as_given(values: dict[str, Any]) -> None:
    """No default, conversion or alias loses what was written."""
    plan = Plan.resolve(values)
    for table, given_values in values.items():
        kept = getattr(plan, table).model_dump()
        for key, value in given_values.items():
            if key not in ("layers", "override"):
                assert kept[key] == (tuple(value) if isinstance(value, list) else value)


@given(moes, st.integers(1, 12))
def test_later_overrides_win_where_they_hit(values: dict[str, Any], count: int) -> None:
    """Against a loop: walk the sites, lay every override that hits over the base, in order."""
    plan = Plan.resolve({"moe": {**values, "layers": "all"}})
    assert plan.moe is not None
    names = [f"m.h.{site}.mlp" for site in range(count)]
    try:
        hits = [Layers.parse(override.layers).resolve(count, names) for override in plan.moe.override]
    except PlanError as missed:
        with pytest.raises(PlanError, match=re.escape(missed.found)):
            plan.layer_settings(count, names)
        return
    settings = plan.layer_settings(count, names)
    assert sorted(settings) == list(range(count))
    for site in range(count):
        wanted = {key: value for key, value in values.items() if key in LayerSettings.model_fields}
        for override, sites in zip(values.get("override", []), hits, strict=True):
            if site in sites:
                wanted |= {key: value for key, value in override.items() if key != "layers"}
        assert settings[site] == LayerSettings(**wanted)


def test_the_pyramid_counts_the_sparse_layers_alone() -> None:
    plan = Plan(moe=Moe(layers="1::2", experts=32, override=(Override(layers="-2:", experts=64),)))
    settings = plan.layer_settings(24, [f"h.{site}.mlp" for site in range(24)])
    assert {site: layer.experts for site, layer in settings.items()} == {
        **dict.fromkeys(range(1, 20, 2), 32),
        21: 64,
        23: 64,
    }


def test_an_override_that_hits_nothing_is_explained() -> None:
    plan = Plan.resolve(
        {"moe": {"layers": "1::2", "experts": 2, "override": [{"layers": "2:", "experts": 4}]}},
    )
    with pytest.raises(PlanError) as caught:
        plan.layer_settings(4, ["a.0", "a.1", "a.2", "a.3"])
    assert str(caught.value) == (
        "moe.override[0].layers\n"
        '  found   layers = "2:", which selects nothing\n'
        '  needed  one that selects some of the 2 layers that moe.layers = "1::2" selects, counted by '
        "themselves: 0 a.1, 1 a.3"
    )


def test_overrides_that_clash_together_are_refused_with_the_layer() -> None:
    first, second = Override(layers="all", experts=2), Override(layers=[1], top_k=4)
    plan = Plan(moe=Moe(layers="all", experts=8, override=(first, second)))
    with pytest.raises(PlanError) as caught:
        plan.layer_settings(2, ["a.0", "a.1"])
    assert caught.value.where == "moe.override, together at layer 1 (a.1)"
    assert caught.value.found == "experts = 2 with top_k = 4"


def test_a_dense_plan_has_no_sparse_layers() -> None:
    assert Plan.resolve(None) == Plan()
    assert Plan().layer_settings(3, ["a", "b", "c"]) == {}


def test_capacities_as_the_operator_takes_them() -> None:
    def pair(**values: Any) -> tuple[float, float]:
        layer = LayerSettings(experts=2, **values)
        return layer.train_capacity, layer.eval_capacity

    assert pair() == (0.0, 0.0)
    assert pair(capacity_factor=1.25) == (1.25, 1.25)
    assert pair(capacity_factor=1, eval_capacity_factor=2) == (1.0, 2.0)
    assert pair(capacity_factor=1.0, eval_capacity_factor="dropless") == (1.0, 0.0)
    assert pair(eval_capacity_factor=2.0) == (0.0, 2.0)


def test_a_bias_replaces_the_balance_term() -> None:
    assert LayerSettings(experts=2, balance_loss=0.5).balance_weight == 0.5
    assert LayerSettings(experts=2, balance_loss=0.5, balance="bias").balance_weight == 0.0


def test_defaults_that_follow_other_values() -> None:
    assert (Train(lr=0.5, steps=70).min_lr, Train(lr=0.5, steps=70).warmup) == (0.05, 7)
    assert Train(steps=10**6).warmup == 100


def test_python_is_told_of_its_mistakes_in_the_same_words() -> None:
    with pytest.raises(PlanError) as caught:
        Moe(layers="all", expert=4)  # type: ignore[call-arg]
    assert caught.value.where == "Moe: expert (first of 2 problems)"
    assert caught.value.nearest == "'experts'"
    with pytest.raises(PlanError, match=r"^Plan: moe\.experts\n  found   experts = 0\n  needed  1 or more$"):
        Plan(moe={"layers": "all", "experts": 0})  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"^plan: train\.steps\n"):
        Plan.resolve({"train": {"steps": 0}})
    with pytest.raises(PlanError, match="found   a int"):
        Plan.resolve(3)  # type: ignore[arg-type]


def test_a_plan_cannot_be_changed() -> None:
    plan = Plan()
    with pytest.raises(ValidationError, match="frozen"):
        plan.train = Train(steps=1)  # type: ignore[misc]


def test_overrides_may_set_whatever_a_layer_has_and_nothing_else() -> None:
    assert set(Override.model_fields) == {"layers", *LayerSettings.model_fields}
    for name, field in LayerSettings.model_fields.items():
        legal = field.default if not field.is_required() else 3
        assert getattr(Override.model_validate({"layers": 0, name: legal}), name) == legal


@pytest.mark.parametrize(
    "table", [Plan, Moe, Override, LayerSettings, Student, Distill, Parallel, Train, Compile]
)
def test_every_key_is_documented(table: type[Plan]) -> None:
    """The reference page is made of these sentences."""
    assert table.__doc__
    for name, field in table.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_sequences_that_nobody_gave_fit_the_positions() -> None:
    """Those of all models that read them; what was given stays, as does all else."""
    open_, given = Plan.from_text("[train]\nsteps = 5"), Plan.from_text("[train]\nsequence = 256")
    assert open_.fitted(64, None, 100).train.sequence == 64
    assert open_.fitted(64).train.steps == 5
    assert open_.fitted(64).fitted(32).train.sequence == 64, "it is given now"
    assert open_.fitted(None) is open_.fitted() is open_.fitted(300) is open_
    assert given.fitted(64) is given
