"""A hypothesis strategy for valid plans.

@given(decoders_and_plans(exact_only=True))
def test_exact_plans_keep_the_function(pair):
    recipe, plan = pair
    ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from moec.errors import PlanError
from moec.plan import Compile, LayerSettings, Moe, Override, Plan
from moec.plan.layers import Layers, LayerSpec

from .decoders import decoders
from .recipe import DecoderRecipe

_EXACT_GATES = ("straight-through", "normalized", "sigmoid")


@st.composite
def selectors(draw: st.DrawFn, num_sites: int, names: Sequence[str] = ()) -> LayerSpec:
    """A layer selector that selects something among `num_sites` sites (`names`: their paths, for globs)."""
    site = st.integers(-num_sites, num_sites - 1)
    bound = st.none() | site
    slices = st.tuples(bound, bound, st.sampled_from((None, 1, 2, 3))).map(_slice_text)
    depths = st.tuples(st.sampled_from((">", ">=", "<", "<=")), st.sampled_from((0.0, 0.25, 0.5, 0.75, 1.0)))
    forms: list[st.SearchStrategy[LayerSpec]] = [
        st.just("all"), slices, site, st.lists(site, min_size=1, max_size=4),
        depths.map(lambda pair: f"depth{pair[0]}{pair[1]}"),
    ]  # fmt: skip
    if names:
        forms.append(st.sampled_from(list(names)))
    return draw(st.one_of(forms).filter(lambda spec: _selects(spec, num_sites, names)))


def _slice_text(parts: tuple[int | None, int | None, int | None]) -> str:
    start, stop, step = ("" if part is None else str(part) for part in parts)
    return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"


def _selects(spec: LayerSpec, num_sites: int, names: Sequence[str]) -> bool:
    try:
        Layers.parse(spec).resolve(num_sites, list(names) or [str(i) for i in range(num_sites)])
    except PlanError:
        return False
    return True


@st.composite
def layer_settings(
    draw: st.DrawFn, *, max_experts: int = 5, exact_only: bool = False, hidden: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of `LayerSettings` that hold together.

    `exact_only`: experts are copies, the weights of the chosen sum to one, no token is dropped, and a dense
    feed-forward kept beside them is mixed in by weights that sum to one: the layer is the feed-forward it was
    made from. `hidden`: the feed-forward's hidden width, without which init `split` is left out.
    """
    experts = draw(st.integers(1, max_experts))
    inits = ["copy", "noise", "partial", "fresh"]
    inits += ["split"] if hidden is not None and hidden % experts == 0 else []
    settings: dict[str, Any] = {
        "experts": experts,
        "top_k": draw(st.integers(1, experts)),
        "residual": draw(st.sampled_from(("none", "learned") if exact_only else ("none", "learned", "sum"))),
        "gate": draw(st.sampled_from(_EXACT_GATES if exact_only else (*_EXACT_GATES, "probability"))),
        "noise": draw(st.sampled_from(("none", "jitter", "rsample"))),
        "jitter": draw(st.sampled_from((0.01, 0.25))),
        "balance": draw(st.sampled_from(("loss", "bias"))),
        "balance_loss": draw(st.sampled_from((0.01, 0.0, 0.5))),
        "bias_rate": draw(st.sampled_from((0.001, 0.1))),
        "z_loss": draw(st.sampled_from((0.0, 0.001))),
        "init": "copy" if exact_only else draw(st.sampled_from(inits)),
        "init_noise": draw(st.sampled_from((0.01, 0.5))),
        "init_ratio": draw(st.sampled_from((0.5, 0.25, 1.0))),
        "router_std": draw(st.sampled_from((0.02, 1.0, 0.0))),
    }
    return settings if exact_only else settings | draw(_capacities())


@st.composite
def _capacities(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "capacity_factor": draw(st.sampled_from(("dropless", 1.0, 0.5, 1.25, 2.0))),
        "eval_capacity_factor": draw(st.sampled_from(("train", "dropless", 1.0, 2.0))),
        "min_capacity": draw(st.sampled_from((4, 0, 1, 2))),
        "random_token_selection": draw(st.booleans()),
    }


@st.composite
def plans(
    draw: st.DrawFn,
    num_sites: int,
    *,
    names: Sequence[str] = (),
    max_experts: int = 5,
    exact_only: bool = False,
    hidden: int | None = None,
    compile: Compile | None = None,
) -> Plan:
    """A valid plan for a model of `num_sites` feed-forwards (at least one), overrides included.

    The other arguments are as in `selectors` and `layer_settings`; `compile` is put in as it is.
    """
    layers = draw(selectors(num_sites, names))
    base = draw(layer_settings(max_experts=max_experts, exact_only=exact_only, hidden=hidden))
    selected = Layers.parse(layers).resolve(num_sites, list(names) or [str(i) for i in range(num_sites)])
    overrides = [
        draw(_overrides(len(selected), base, max_experts, exact_only, hidden))
        for _ in range(draw(st.integers(0, 2)))
    ]
    moe = Moe(layers=layers, override=tuple(overrides), seed=draw(st.integers(0, 3)), **base)
    return Plan(moe=moe) if compile is None else Plan(moe=moe, compile=compile)


@st.composite
def _overrides(
    draw: st.DrawFn,
    num_selected: int,
    base: dict[str, Any],
    max_experts: int,
    exact: bool,
    hidden: int | None,
) -> Override:
    """Some keys of other valid settings. Keys that depend on each other (experts, top_k, init) go
    together."""
    other = draw(layer_settings(max_experts=max_experts, exact_only=exact, hidden=hidden))
    tied = ("experts", "top_k", "init")
    free = [key for key in other if key not in tied]
    chosen = {key: other[key] for key in draw(st.sets(st.sampled_from(free), max_size=4))}
    if not chosen or draw(st.booleans()):
        chosen |= {key: other[key] for key in tied}
    return Override(layers=draw(selectors(num_selected)), **chosen)


@st.composite
def decoders_and_plans(
    draw: st.DrawFn,
    *,
    exact_only: bool = False,
    max_experts: int = 4,
    compile: Compile | None = None,
    **options: Any,
) -> tuple[DecoderRecipe, Plan]:
    """A decoder and a plan that fits it; `options` go to `decoders`."""
    recipe = draw(decoders(**options))
    names = recipe.site_paths()
    plan = plans(
        recipe.num_sites, names=names, max_experts=max_experts, exact_only=exact_only,
        hidden=recipe.ffn.hidden, compile=compile,
    )  # fmt: skip
    return recipe, draw(plan)


__all__ = ["LayerSettings", "decoders_and_plans", "layer_settings", "plans", "selectors"]
