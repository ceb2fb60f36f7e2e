"""Over random decoders: the captured program is the model bit for bit, every pass is exact, structure is
the truth.

One compile serves all checks of an example: `verify="full"` compares logits and the gradients of every
parameter after each pass in fp64 and raises where they differ by more than 1e-10 of their scale.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import moec
from moec.capture import capture
from moec.ir import region_of, regions
from moec.ir.compare import comparisons, observe
from moec.testing import NAMED, DecoderRecipe, assert_same_function, decoders, decoys
from moec.testing.decoys import DecoyRecipe
from moec.testing.recipe import Answer

SHAPES = ((2, 9), (1, 1), (1, 9), (2, 1), (3, 40))
EXAMPLES = max(10, settings().max_examples // 5)


class Logits(nn.Module):
    """A recipe's model as a function from tokens to logits."""

    def __init__(self, recipe: DecoderRecipe, model: nn.Module) -> None:
        super().__init__()
        self.recipe, self.model = recipe, model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.recipe.logits(self.model, tokens)


def compiled(recipe: DecoderRecipe, model: nn.Module) -> moec.Program:
    """The dense program of a fp64 model, every pass proved where the model itself computes in fp64."""
    return moec.compile(model, verify="off" if recipe.computes_in_float32 else "full")


def assert_captured_is_source(recipe: DecoderRecipe, model: nn.Module, program: moec.Program) -> None:
    """Bit for bit, in evaluation mode, at every shape."""
    captured = program.stages["captured"].eval()
    for batch, length in SHAPES:
        tokens = recipe.tokens(seed=batch + length, batch=batch, length=length)
        with torch.no_grad():
            needed, found = recipe.logits(model, tokens), captured(tokens)
        assert torch.equal(found, needed), f"[{batch}, {length}]: {(found - needed).abs().max()}"


def assert_stages_agree(recipe: DecoderRecipe, program: moec.Program) -> None:
    """Canonical and structured give the logits of captured at the shapes the proofs do not see."""
    needed, tolerance = program.stages["captured"].eval(), 1e-5 if recipe.computes_in_float32 else 1e-10
    for batch, length in SHAPES[1:]:
        tokens = recipe.tokens(seed=length, batch=batch, length=length)
        with torch.no_grad():
            logits = needed(tokens)
            for stage in ("canonical", "structured"):
                gap = (program.stages[stage].eval()(tokens) - logits).abs().max() / logits.abs().max()
                assert gap <= tolerance, f"{stage} [{batch}, {length}]: {gap}"


def assert_structure(program: moec.Program, answer: Answer) -> None:
    """Every feed-forward with its weights, every attention weight, the head: what the recipe says and no
    more."""
    found = []
    for name, module in regions(program.graph, "ffn").items():
        region = region_of(module)
        assert region is not None
        public = {r: program.origins.public_name(f"{name}.{weight}") for r, weight in region.roles.items()}
        found.append(sorted(public.values()))
        assert public["down"] in {site.weights["down"] for site in answer.sites}
    assert found == [sorted(site.weights.values()) for site in answer.sites]
    for weight in answer.attention:
        assert program.ledger[weight].role.startswith("attention"), program.ledger[weight]
    assert program.ledger[answer.head].role == "head"
    listed = {entry.weight for entry in program.ledger}
    assert listed == {*answer.feed_forward_weights, *answer.attention, answer.head} | (
        listed - _known(answer)
    )


def _known(answer: Answer) -> set[str]:
    return {*answer.feed_forward_weights, *answer.attention, answer.head}


def assert_names(program: moec.Program, model: nn.Module) -> None:
    """The user's parameter names, tied ones once, all with an origin; the state dict goes there and back."""
    assert {name for name, _ in program.named_parameters()} == {name for name, _ in model.named_parameters()}
    structural = {name for name, _ in program.graph.named_parameters()}
    assert structural <= set(program.origins)
    dense = program.to_dense_state_dict()
    assert dense.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(dense[name], value), name


@settings(max_examples=EXAMPLES)
@given(decoders())
def test_a_decoder_is_compiled_exactly_and_its_structure_found(recipe: DecoderRecipe) -> None:
    model = recipe.build(seed=1, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    program = compiled(recipe, model)
    assert model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert_captured_is_source(recipe, model.eval(), program)
    assert_stages_agree(recipe, program)
    assert_structure(program, recipe.answer())
    assert_names(program, model)


@settings(max_examples=EXAMPLES)
@given(decoys())
def test_what_only_looks_like_a_feed_forward_is_refused_with_its_reason(decoy: DecoyRecipe) -> None:
    model = decoy.build(seed=1, dtype=torch.float64).eval()
    program = moec.compile(model, verify="off")
    assert_captured_is_source(decoy.recipe, model, program)
    truth = decoy.answer()
    found = {
        program.origins.public_name(f"{name}.{weight}")
        for name, module in regions(program.graph, "ffn").items()
        for weight in region_of(module).roles.values()  # type: ignore[union-attr]
    }
    assert found == set(truth.feed_forward_weights)
    reasons = [program.ledger[weight].reason for weight in decoy.weights()]
    assert any(word in reason for reason in reasons for word in decoy.reason), reasons


@pytest.mark.parametrize("name", NAMED)
def test_gradients_of_every_parameter_are_the_models(name: str) -> None:
    recipe = NAMED[name].without_dropout()
    model = recipe.build(seed=2, dtype=torch.float64)
    program = capture(model)
    structural = {f"graph.{key}": f"model.{program.origins.public_name(key)}" for key in program.origins}
    names = structural | {value.removeprefix("model."): value for value in structural.values()}
    tolerance = 1e-5 if recipe.computes_in_float32 else 1e-12
    assert_same_function(
        Logits(recipe, model.train()), program.train(), [recipe.tokens()], names=names, tolerance=tolerance
    )


def test_a_changed_weight_is_noticed() -> None:
    """The comparison these tests rest on sees one changed number."""
    program = capture(NAMED["nano_gpt"].build(seed=0, dtype=torch.float64))
    tokens = NAMED["nano_gpt"].tokens()
    needed = observe(program.graph, program.origins, tokens)
    with torch.no_grad():
        next(program.parameters()).view(-1)[:40].mul_(1.0 + 1e-6)
    checks = comparisons(needed, observe(program.graph, program.origins, tokens))
    assert not all(check.holds for check in checks)
