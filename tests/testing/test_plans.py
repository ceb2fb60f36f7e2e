"""Drawn plans are valid, varied, and as exact as they are asked to be."""

from __future__ import annotations

from hypothesis import find, given
from hypothesis import strategies as st

from moec.plan import Plan
from moec.testing import DecoderRecipe, decoders_and_plans, plans, selectors
from moec.testing.decoders import decoders

NAMES = [f"blocks.{i}.mlp" for i in range(5)]


@given(plans(5, names=NAMES))
def test_every_plan_selects_something_and_round_trips(plan: Plan) -> None:
    settings = plan.layer_settings(5, NAMES)
    assert settings
    assert all(0 <= site < 5 and s.top_k <= s.experts for site, s in settings.items())
    assert Plan.from_text(plan.to_toml()) == plan


@given(plans(3, exact_only=True))
def test_exact_plans_hold_to_what_makes_them_exact(plan: Plan) -> None:
    for settings in plan.layer_settings(3, NAMES[:3]).values():
        assert settings.init == "copy"
        assert settings.gate != "probability"
        assert settings.residual != "sum"
        assert settings.train_capacity == settings.eval_capacity == 0.0


@given(st.data())
def test_splits_divide_the_hidden_width(data: st.DataObject) -> None:
    hidden = data.draw(st.sampled_from((6, 7, 12)))
    plan = data.draw(plans(4, hidden=hidden))
    for settings in plan.layer_settings(4, NAMES[:4]).values():
        assert settings.init != "split" or hidden % settings.experts == 0


@given(decoders_and_plans(max_layers=3))
def test_pairs_fit(pair: tuple[DecoderRecipe, Plan]) -> None:
    recipe, plan = pair
    names = [site.path for site in recipe.answer().sites]
    assert plan.layer_settings(recipe.num_sites, names)


def test_the_strategies_reach_the_corners() -> None:
    """`find` raises when nothing of the kind is ever drawn."""
    assert find(plans(3), lambda p: p.moe is not None and len(p.moe.override) == 2)
    assert find(
        plans(3, hidden=12), lambda p: p.moe is not None and p.moe.init == "split" and p.moe.experts > 1
    )
    assert find(selectors(4), lambda s: isinstance(s, str) and s.startswith("depth"))
    assert find(decoders(), lambda r: r.share == "block" and r.positions == "alibi")
    assert find(decoders(), lambda r: r.ffn.gating == "fused" and r.ffn.fused == "view")
    assert find(decoders(), lambda r: r.attention.qkv == "groups" and r.attention.num_heads > 3)
