"""Test your own passes the way moec tests its own.

A rewrite is easy to get nearly right. What finds the rest is a stream of models nobody wrote by hand, an
oracle too dumb to share the mistake, and comparisons that look at gradients as well as values:

    from hypothesis import given
    from moec.testing import assert_preserves, decoders

    @given(decoders(float32=False, dropout=False))
    def test_my_pass_keeps_the_function(recipe):
        program = moec.compile(recipe.build(seed=0, dtype=torch.float64), plan=None)
        assert_preserves(MyPass(), program)

`decoders()` draws *recipes* of ordinary decoders: odd sizes, every usual spelling of norms, positions,
attention and feed-forwards, weights shared and tied in every usual way. A recipe is a frozen dataclass. It
prints as the expression that rebuilds it, `build(seed, dtype, device)` makes the model, `logits(model,
tokens)` runs it whatever its interface, and `answer()` is the truth about its structure: which weights are
feed-forwards' (by role), which are attention's, which is the head. `NAMED` holds fixed recipes after
well-known families, for quick tests.

`decoys()` draws decoders in which some feed-forwards are replaced by things that only look like one (a LoRA
pair, a gated attention, a squeeze over the sequence, …), each with words that the reason for refusing it
must hold.

`plans(num_sites)` draws valid plans, `decoders_and_plans()` both; `exact_only=True` keeps to plans under
which the sparse model is the same function as the dense one.

`moe_oracle` evaluates an expert layer one token at a time with the dense feed-forward itself, and computes
gates, capacity and loss terms from their definitions, in whatever precision it is given (float64 for
proofs).

Assertions: `assert_same_function(needed, found, inputs)` for any two callables, values and gradients;
`assert_preserves(pass_, program)` and `assert_refuses(pass_, program, match=…)` for passes, which also see
to it that the program they were given is left untouched; `assert_golden(text, path)` for printed programs.

Numbers are compared relative to scale with the one table in `moec.testing.tolerances`, where the reasons
stand. This package needs `hypothesis`: `pip install moec[testing]`."""

from __future__ import annotations

from moec.ir.expert_oracle import OracleAnswer, moe_oracle

# At once, not lazily: `decoders`, `decoys` and `plans` are strategies and also the modules they live in; only
# names bound here, after the modules were loaded, are sure to be the strategies.
from moec.testing.decoders import attentions, decoders, feed_forwards, norms
from moec.testing.decoys import DECOYS, DecoyRecipe, decoys
from moec.testing.golden import assert_golden
from moec.testing.named import NAMED
from moec.testing.pass_assertions import assert_preserves, assert_refuses, source_gradients
from moec.testing.plans import decoders_and_plans, layer_settings, plans, selectors
from moec.testing.recipe import Answer, DecoderRecipe, Site
from moec.testing.same_function import assert_same_function
from moec.testing.tolerances import TOLERANCES, error_of, tolerance_of

__all__ = [
    "DECOYS",
    "NAMED",
    "TOLERANCES",
    "Answer",
    "DecoderRecipe",
    "DecoyRecipe",
    "OracleAnswer",
    "Site",
    "assert_golden",
    "assert_preserves",
    "assert_refuses",
    "assert_same_function",
    "attentions",
    "decoders",
    "decoders_and_plans",
    "decoys",
    "error_of",
    "feed_forwards",
    "layer_settings",
    "moe_oracle",
    "norms",
    "plans",
    "selectors",
    "source_gradients",
    "tolerance_of",
]
