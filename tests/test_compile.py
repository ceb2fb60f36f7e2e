"""`moec.compile` on decoders and plans nobody wrote by hand: every program against the source model.
 A plan that keeps the function gives the source model's logits and gradients. Any other plan gives those
of the source model with its chosen feed-forwards evaluated one token at a time (`sparse_source`). In
fp64, to 1e-10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import given, settings
from sparse_source import Draws, Leaves, Recorder, gather, sparse_source
from torch import Tensor, nn

import moec
from moec.ir.compare import source_gradients
from moec.plan import LayerSettings, Plan
from moec.testing import DecoderRecipe, decoders_and_plans
from moec.testing.same_function import compare, compare_gradients

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
