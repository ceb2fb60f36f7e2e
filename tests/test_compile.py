"""`moec.compile` on decoders and plans nobody wrote by hand: every program against the source model.

A plan that keeps the function gives the source model's logits and gradients. Any other plan gives those
of the source model with its chosen feed-forwards evaluated one token at a time (`sparse_source`). In
fp64, to 1e-10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import moec
from moec.ir.compare import source_gradients
from moec.plan import LayerSettings, Moe, Plan
from moec.testing import DecoderRecipe, decoders_and_plans
from moec.testing.parts.feed_forward import FUSED, FeedForwardRecipe
from moec.testing.same_function import compare, compare_gradients
from tests.sparse_source import Draws, Leaves, Recorder, gather, sparse_source

PAIRS = settings.default.max_examples // 2  # of each kind: 50 pairs by default, 500 in the nightly profile
TOLERANCE = 1e-10
SHAPES = ((2, 5), (1, 1), (1, 7))

# captured programs, and plans that keep the function


@settings(max_examples=PAIRS)
@given(decoders_and_plans(exact_only=True, float32=False, dropout=False))
def test_plans_that_keep_the_function(pair: tuple[DecoderRecipe, Plan]) -> None:
    recipe, plan = pair
    model = recipe.build(0, torch.float64)
    program = moec.compile(model, plan, verify="off")
    for shape, training in zip(SHAPES, (False, True, True), strict=True):
        tokens = recipe.tokens(1, *shape)
        _assert_same_function(recipe, model, program, tokens, training)


def _assert_same_function(
    recipe: DecoderRecipe, model: nn.Module, program: moec.Program, tokens: Tensor, training: bool
) -> None:
    """Logits and gradients of the source model; and, without the plan, of the program as captured."""
    logits, gradients = _source(recipe, model, tokens)
    captured = program.stages["captured"]
    found = captured.train(training)(tokens)
    compare({"captured logits": found}, {"captured logits": logits}, TOLERANCE)
    program.train(training)
    program.zero_grad()
    out = program(tokens)
    _pull(out).backward()
    compare({"logits": out}, {"logits": logits}, TOLERANCE)
    compare_gradients(source_gradients(program.graph, program.origins), gradients, TOLERANCE)


def _source(recipe: DecoderRecipe, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Leaves]:
    logits = recipe.logits(model, tokens)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(_pull(logits), list(named.values()), allow_unused=True)
    pairs = zip(named.items(), found, strict=True)
    return logits, {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def _pull(logits: Tensor) -> Tensor:
    """A fixed random projection of the logits."""
    generator = torch.Generator().manual_seed(2)
    return (logits * torch.randn(logits.shape, generator=generator, dtype=torch.float64)).sum()


# plans that change the model


@settings(max_examples=PAIRS)
@given(decoders_and_plans(float32=False, dropout=False))
def test_every_plan_against_experts_by_hand(pair: tuple[DecoderRecipe, Plan]) -> None:
    recipe, plan = pair
    program = _compiled(recipe, plan)
    for shape, training in (((2, 5), False), ((1, 4), True)):
        assert_as_by_hand(recipe, plan, program, recipe.tokens(1, *shape), training)


def _compiled(recipe: DecoderRecipe, plan: Plan) -> moec.Program:
    program = moec.compile(recipe.build(0, torch.float64), plan, verify="off")
    generator = torch.Generator().manual_seed(7)
    for bias in program.moe_biases().values():
        bias += 0.1 * torch.rand(bias.shape, generator=generator, dtype=bias.dtype)
    return program


def assert_as_by_hand(
    recipe: DecoderRecipe, plan: Plan, program: moec.Program, tokens: Tensor, training: bool
) -> None:
    """Logits, loss terms, loads and every gradient, of the program's weights and of the user's."""
    chosen = plan.layer_settings(recipe.num_sites, recipe.site_paths())
    program.train(training).zero_grad()
    recorder = Recorder(program.graph)
    logits, terms = recorder.run(tokens)
    draws = recorder.draws()
    source = sparse_source(recipe, program, chosen, _random_ones(chosen, draws) if training else None)
    source.model.train(training)
    needed = source.logits(tokens)
    compare({"logits": logits, **_terms(terms)}, {"logits": needed, **source.terms()}, TOLERANCE)
    for site, layer in source.layers.items():
        assert layer.answer is not None
        assert terms["counts"][f"moe_{site}"].tolist() == layer.answer.counts.tolist()
    (_pull(logits) + sum(_terms(terms).values())).backward()
    (_pull(needed) + sum(source.terms().values())).backward()
    _assert_gradients(program, source.parameters, source.leaves)


def _terms(terms: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: terms[name] for name in ("balance", "z")}


def _random_ones(chosen: Mapping[int, LayerSettings], draws: Mapping[int, Draws]) -> dict[int, Draws]:
    """What the oracle must be told: only what the plan makes random; it finds the rest by itself."""
    told = {}
    for site, s in chosen.items():
        drawn = draws[site]
        _assert_possible(s, drawn)
        told[site] = Draws(
            drawn.jitter if s.noise == "jitter" else None,
            drawn.choices if s.noise == "rsample" else None,
            drawn.kept if s.random_token_selection else None,
        )
    return told


def _assert_possible(s: LayerSettings, drawn: Draws) -> None:
    assert drawn.choices is not None
    assert all(len(set(row)) == s.top_k and max(row) < s.experts for row in drawn.choices)
    if drawn.jitter is not None:
        assert bool(((drawn.jitter - 1).abs() <= s.jitter + 1e-9).all())


def _assert_gradients(program: moec.Program, parameters: Leaves, leaves: Leaves) -> None:
    own = {n: p for n, p in program.graph.named_parameters(remove_duplicate=False) if n in leaves}
    compare_gradients(_grads(own), _grads({n: leaves[n] for n in own}), TOLERANCE)
    found: Leaves = {}
    for name, parameter in program.graph.named_parameters():
        _add(found, program, name, parameter)
    needed = _grads(parameters)
    seen = set[int]()
    for name, leaf in leaves.items():
        if id(leaf) not in seen and leaf.requires_grad:
            seen.add(id(leaf))
            _add(needed, program, name, leaf)
    compare_gradients(found, needed, TOLERANCE)


def _add(sums: Leaves, program: moec.Program, name: str, value: Tensor) -> None:
    origin = program.origins[name]
    if origin.source is not None:
        pulled = gather(origin, _grads({"": value})[""])
        sums[origin.source] = sums[origin.source] + pulled if origin.source in sums else pulled


def _grads(named: Mapping[str, Tensor]) -> Leaves:
    return {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in named.items()}


# corners

PLAIN = DecoderRecipe(num_layers=2)
CORNERS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "one token": ({"experts": 5, "top_k": 2, "init": "noise"}, (1, 1)),
    "more experts than tokens": ({"experts": 17, "top_k": 3, "init": "noise"}, (1, 3)),
    "all experts chosen": ({"experts": 3, "top_k": 3, "gate": "probability", "init": "fresh"}, (2, 5)),
    "all tokens to one expert": ({"experts": 4, "router_std": 0.0, "init": "noise"}, (2, 5)),
    "one expert takes all it may": (
        {"experts": 4, "router_std": 0.0, "init": "noise", "capacity_factor": 1.0, "min_capacity": 0}, (2, 5),
    ),
    "nothing kept beyond one row": (
        {"experts": 2, "top_k": 2, "init": "noise", "capacity_factor": 0.1, "min_capacity": 0}, (1, 7),
    ),
    "prime sizes": ({"experts": 7, "top_k": 5, "gate": "sigmoid", "init": "partial"}, (3, 5)),
    "a slice of the units": ({"experts": 4, "top_k": 2, "init": "split", "residual": "sum"}, (2, 5)),
    "one expert": ({"experts": 1, "gate": "probability", "init": "split"}, (2, 5)),
}  # fmt: skip


@pytest.mark.parametrize("corner", CORNERS)
def test_corner(corner: str) -> None:
    chosen, shape = CORNERS[corner]
    plan = Plan(moe=Moe(layers="all", **chosen))
    program = _compiled(PLAIN, plan)
    for training in (False, True):
        assert_as_by_hand(PLAIN, plan, program, PLAIN.tokens(1, *shape), training)


@pytest.mark.parametrize("spelling", ["module", "addmm", "matmul", "einsum"])
@pytest.mark.parametrize("fused", FUSED)
def test_fused_gate_and_up_dealt_out(fused: str, spelling: str) -> None:
    """Slices of a fused pair take the same units of both halves, biases included."""
    ffn = FeedForwardRecipe(hidden=12, gating="fused", activation="silu", fused=fused, spelling=spelling)  # type: ignore[arg-type]
    recipe = DecoderRecipe(num_layers=1, ffn=ffn)
    plan = Plan(moe=Moe(layers="all", experts=3, top_k=2, init="split"))
    assert_as_by_hand(recipe, plan, _compiled(recipe, plan), recipe.tokens(1, 2, 5), False)


def test_empty_experts_learn_nothing_and_break_nothing() -> None:
    plan = Plan(moe=Moe(layers="all", experts=9, init="noise", router_std=0.0))
    program = _compiled(PLAIN, plan).train()
    _, terms = program.run(PLAIN.tokens(1, 2, 5))
    assert [int((counts > 0).sum()) for counts in terms["counts"].values()] == [1, 1]
    program.loss(PLAIN.tokens(1, 2, 5)).backward()
    gradient = dict(program.graph.named_parameters())["moe_0.up.weight"].grad
    assert gradient is not None
    assert bool(gradient[0].abs().sum() > 0)
    assert not bool(gradient[1:].any())


# randomness of training


@pytest.mark.parametrize("noise", ["jitter", "rsample"])
def test_noise_in_training_only(noise: str) -> None:
    plan = Plan(
        moe=Moe(
            layers="all", experts=6, top_k=2, noise=noise, jitter=0.5, init="noise", init_noise=1.0,  # type: ignore[arg-type]
            capacity_factor=0.5, random_token_selection=True, eval_capacity_factor="dropless",
        )
    )  # fmt: skip
    program = _compiled(PLAIN, plan)
    tokens = PLAIN.tokens(1, 3, 7)
    state = torch.get_rng_state()
    assert torch.equal(program.eval()(tokens), program(tokens))
    assert torch.equal(torch.get_rng_state(), state), "evaluation drew random numbers"
    noisy = [program.train()(tokens) for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(program.eval()(tokens), program(tokens))


def test_jitter_is_drawn_anew_for_every_value() -> None:
    plan = Plan(moe=Moe(layers="all", experts=2, noise="jitter", jitter=0.1))
    recorder = Recorder(_compiled(PLAIN, plan).train().graph)
    recorder.run(PLAIN.tokens(1, 3, 7))
    for drawn in recorder.draws().values():
        assert drawn.jitter is not None
        assert drawn.jitter.unique().numel() == drawn.jitter.numel()
        assert 0.05 < float((drawn.jitter - 1).abs().max()) <= 0.1


# precision


@settings(max_examples=max(4, PAIRS // 5))
@given(decoders_and_plans(exact_only=True, dropout=False))
def test_plans_that_keep_the_function_in_float32(pair: tuple[DecoderRecipe, Plan]) -> None:
    """Also the decoders that cast to fp32 and back, in their own precision."""
    recipe, plan = pair
    model = recipe.build()
    program = moec.compile(model, plan, verify="off")
    tokens = recipe.tokens(1, 2, 5)
    with torch.no_grad():
        compare({"logits": program(tokens)}, {"logits": recipe.logits(model, tokens)}, None)
