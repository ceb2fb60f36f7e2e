"""The random decoders are what they claim: causal, deterministic, connected, exportable, truly answered."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.export import Dim

from moec.testing.decoders import decoders
from moec.testing.named import NAMED
from moec.testing.recipe import DecoderRecipe, LogitsOnly

EXPORTED = (
    "nano_gpt",
    "gpt2_like",
    "llama_cast_like",
    "falcon_like",
    "bloom_like",
    "gemma_like",
    "shared_ffn",
)


def _logits(recipe: DecoderRecipe, model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return recipe.logits(model.eval(), tokens)


def check_causal_and_deterministic(recipe: DecoderRecipe) -> None:
    model, tokens = recipe.build(3, torch.float64), recipe.tokens(1)
    before = _logits(recipe, model, tokens)
    assert torch.equal(before, _logits(recipe, model, tokens))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % recipe.vocab
    after = _logits(recipe, model, changed)
    assert before.isfinite().all()
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-6, atol=1e-6)
    assert (before[:, 6:] - after[:, 6:]).abs().amax() > 1e-4, "later tokens must matter to later logits"


def check_gradients_and_names(recipe: DecoderRecipe) -> None:
    model, tokens = recipe.build(3, torch.float64), recipe.tokens(1)
    named = dict(model.named_parameters())
    recipe.logits(model.train(), tokens).square().mean().backward()
    assert [name for name, p in named.items() if p.grad is None or not p.grad.isfinite().all()] == []
    answer = recipe.answer()
    products = [*answer.feed_forward_weights, *dict.fromkeys(answer.attention), answer.head]
    assert set(products) <= set(named)
    embedding = f"{recipe.names.embedding}.weight"
    matrices = {n for n, p in named.items() if p.ndim == 2 and n != "positions.weight"} - {embedding}
    assert matrices == set(products) - {embedding}, "every matrix of the model has its place in the answer"


@pytest.mark.parametrize("name", NAMED)
def test_named_decoders_are_causal_and_connected(name: str) -> None:
    check_causal_and_deterministic(NAMED[name])
    check_gradients_and_names(NAMED[name])


@given(decoders())
def test_random_decoders_are_causal_and_connected(recipe: DecoderRecipe) -> None:
    check_causal_and_deterministic(recipe)
    check_gradients_and_names(recipe)


@given(decoders(float32=False, dropout=False))
def test_a_decoder_can_be_asked_for_without_casts_and_dropout(recipe: DecoderRecipe) -> None:
    assert not recipe.computes_in_float32
    model, tokens = recipe.build(0, torch.float64).train(), recipe.tokens()
    assert torch.equal(recipe.logits(model, tokens), recipe.logits(model.eval(), tokens))


@given(decoders())
def test_a_recipe_prints_as_the_expression_that_rebuilds_it(recipe: DecoderRecipe) -> None:
    from moec.testing import recipe as vocabulary

    assert eval(repr(recipe), dict(vars(vocabulary))) == recipe


def check_exports(recipe: DecoderRecipe) -> None:
    """As capture must: non-strict, batch and sequence dynamic, from a two-by-nine sample."""
    model = LogitsOnly(recipe, recipe.build(3, torch.float64)).eval()
    sizes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    exported = torch.export.export(model, (recipe.tokens(),), strict=False, dynamic_shapes=sizes).module()
    for batch, length in ((2, 9), (1, 9), (3, 5), (1, 1)):
        tokens = recipe.tokens(5, batch, length)
        with torch.no_grad():
            assert torch.equal(model(tokens), exported(tokens))


@pytest.mark.parametrize("name", EXPORTED)
def test_named_decoders_export(name: str) -> None:
    check_exports(NAMED[name])


@settings(max_examples=6)
@given(decoders(max_layers=2))
def test_random_decoders_export(recipe: DecoderRecipe) -> None:
    check_exports(recipe)
