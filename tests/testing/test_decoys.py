"""Decoys build, run, carry gradients, and are each what they say they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from moec.testing import DECOYS, NAMED, DecoyRecipe, decoys
from moec.testing.recipe import LogitsOnly

KINDS = tuple(DECOYS)


def _module(kind: str) -> tuple[nn.Module, Tensor]:
    recipe = NAMED["llama_like"]
    model = DecoyRecipe(kind, recipe, (0,)).build(1, torch.float64)
    x = torch.randn(2, 7, recipe.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return model.get_submodule("layers.0.mlp"), x


@given(decoys())
def test_decoys_run_and_every_parameter_takes_part(decoy: DecoyRecipe) -> None:
    model, tokens = decoy.build(1, torch.float64), decoy.recipe.tokens()
    logits = decoy.recipe.logits(model.eval(), tokens)
    assert logits.shape == (2, 9, decoy.recipe.vocab)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@given(decoys())
def test_what_is_real_and_what_is_not_share_no_weight(decoy: DecoyRecipe) -> None:
    names = {name for name, _ in decoy.build(device="meta").named_parameters()}
    real, false = set(decoy.answer().feed_forward_weights), set(decoy.weights())
    assert real <= names
    assert false <= names
    assert not real & false
    assert len(false) >= 2 * len(decoy.layers)
    assert len(decoy.answer().sites) == decoy.recipe.num_layers - len(decoy.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_decoys_are_causal_unless_they_say_otherwise(kind: str) -> None:
    module, x = _module(kind)
    later = x.clone()
    later[:, 5:] += 1.0
    same = torch.allclose(module(x)[:, :5], module(later)[:, :5], atol=1e-9)
    assert same is DECOYS[kind].causal


@pytest.mark.parametrize(
    "kind", ["cumulative_sum", "time_shift", "conv_mixer", "sequence_squeeze", "gated_attention"]
)
def test_these_mix_tokens(kind: str) -> None:
    module, x = _module(kind)
    other = x.clone()
    other[:, 0] += 1.0
    assert not torch.allclose(module(other)[:, 1], module(x)[:, 1], atol=1e-6)


def test_the_low_rank_pair_is_linear() -> None:
    module, x = _module("low_rank_pair")
    zero = module(torch.zeros_like(x))
    torch.testing.assert_close(module(3 * x) - zero, 3 * (module(x) - zero), rtol=1e-10, atol=1e-10)


@settings(max_examples=5)
@given(decoys(max_layers=2))
def test_decoys_export(decoy: DecoyRecipe) -> None:
    model = LogitsOnly(decoy.recipe, decoy.build(1)).eval()
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    exported = torch.export.export(
        model, (decoy.recipe.tokens(),), strict=False, dynamic_shapes=sizes
    ).module()
    tokens = decoy.recipe.tokens(4, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), exported(tokens))
