"""Alignment of every pass: each node is kept, created or removed exactly as the rewrite did.

Random decoders go through all passes under random plans; `genealogy.py` tells from the node objects what each
pass did, and knows nothing of identities.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moec
import moec.passes
from moec.api import unplaced
from moec.capture import capture
from moec.ir import Pass, Program, align
from moec.ir.identity import identity_of, places
from moec.passes.fuse_norms import FuseNorms
from moec.passes.keep_layers import KeepLayers
from moec.passes.name_axes import NameAxes
from moec.passes.pipeline import (
    cached,
    canonical,
    fused,
    fused_decoder,
    partitioned,
    placed,
    sparse,
    structured,
)  # fmt: skip
from moec.passes.renew_weights import RenewWeights
from moec.passes.runner import Runner
from moec.passes.tap_hidden import TapHidden
from moec.plan import Plan
from moec.testing import NAMED, decoders_and_plans
from moec.testing.recipe import DecoderRecipe
from tests.passes.genealogy import require_true, watched

aten = torch.ops.aten
SEEN: Counter[str] = Counter()  # pass and word → nodes, of all that was compared in this process
WATCHED: set[type[Pass]] = set()
EVERYDAY, NIGHTLY = 4, 150


def num_examples() -> int:
    return NIGHTLY if settings().max_examples > 50 else EVERYDAY


def through(program: Program, passes: Iterable[Pass]) -> Program:
    """All passes, each compared with the truth."""
    for rewrite in passes:
        with watched(rewrite) as found:
            made = Runner(verify="off").run(program, [rewrite])
        try:
            words = require_true(program, made, found)
        except AssertionError as error:
            error.add_note(f"in the pass {rewrite.name}")
            raise
        WATCHED.add(type(rewrite))
        SEEN.update({f"{rewrite.name} {word}": count for word, count in words.items()})
        program = made
    return program


def captured(recipe: DecoderRecipe) -> Program:
    return capture(recipe.build(seed=0, dtype=torch.float64))


def everything(recipe: DecoderRecipe, plan: Plan, world: int, parallel: dict[str, Any], drop: int) -> None:
    """Every pass that there is, on every way a program can go."""
    whole = through(captured(recipe), [*canonical(), *structured()])
    dense = whole
    if drop < recipe.num_layers:
        dense = through(whole, [KeepLayers(tuple(range(drop, recipe.num_layers))), RenewWeights(0)])
    program = through(whole, sparse(plan))
    assert_lineage(program, dense)
    plan = Plan.resolve({**plan.model_dump(exclude_none=True), "parallel": parallel})
    try:
        lying = through(program, placed(plan, world))
    except moec.PlanError:  # a mesh that does not fit the model; tests of the placement say when
        lying = None
    if lying is not None:
        rank = through(lying, partitioned(0))
        through(rank, [*fused(), NameAxes("teacher")])
        assert_lineage(whole, rank)
    through(program, [TapHidden((0,))])
    through(program, fused())
    decoder = through(unplaced(program), cached(16))
    assert_lineage(whole, through(decoder, [FuseNorms(devices=("cpu",)), *fused_decoder(packed=True)]))


def assert_lineage(first: Program, last: Program) -> None:
    """No node changes its operator in many passes, and what was created comes of nodes that are there."""
    aligned = align(first.graph, last.graph)
    for old, new in aligned.kept.values():
        assert old.node.op == new.node.op
        assert old.node.op != "call_function" or old.node.target is new.node.target
    known = {identity_of(place.node) for place in places(first.graph)}
    assert known.issuperset(key for found in aligned.ancestors.values() for key in found)


meshes = st.fixed_dictionaries(
    {"tensor": st.sampled_from((2, 1)), "expert": st.integers(1, 3), "node": st.sampled_from((2, 1))}
)


@settings(max_examples=num_examples())
@given(
    decoders_and_plans(float32=False, max_experts=4, max_layers=2), st.sampled_from((2, 4)), meshes,
    st.integers(0, 1),
)  # fmt: skip
def test_every_pass_on_any_decoder(
    pair: tuple[DecoderRecipe, Plan], world: int, parallel: dict[str, Any], drop: int
) -> None:
    everything(*pair, world, parallel, drop)


def test_no_pass_is_left_out() -> None:
    """A residual layer on four ranks, a layer left out: what not every example above has."""
    plan = Plan(moe={"layers": "all", "experts": 4, "residual": "learned", "capacity_factor": 1.0})
    everything(NAMED["gpt2_like"], plan, 4, {"tensor": 2, "expert": 2, "node": 2}, 1)
    for module in pkgutil.iter_modules(moec.passes.__path__):
        importlib.import_module(f"moec.passes.{module.name}")
    ours = {kind for kind in Pass.__subclasses__() if kind.__module__.startswith("moec.passes.")}
    assert {kind.__name__ for kind in ours} == {kind.__name__ for kind in WATCHED & ours}
    for name in ("keep_layers", "spell_activations", "lower_experts", "fuse_mix"):
        assert SEEN[f"{name} removed"] > 0
    for name in ("lift_experts", "overlap_exchanges", "outline_feed_forwards", "outline_positions"):
        assert SEEN[f"{name} moved"] > 0


def test_passes_that_wait_for_larger_weights() -> None:
    """Products are joined, and computed by moec's own operator, where their weights are large enough."""
    attention = replace(NAMED["llama_like"].attention, num_heads=4, num_kv_heads=2, head_dim=16)
    recipe = replace(NAMED["llama_like"], d_model=64, num_layers=1, attention=attention)
    recipe = replace(recipe, ffn=replace(recipe.ffn, hidden=256))
    program = through(capture(recipe.build(seed=0)), [*canonical(), *structured()])
    through(through(program, cached(16)), fused_decoder(packed=True))
    assert SEEN["fuse_qkv created"] > 0
    assert SEEN["choose_products created"] > 0


@dataclass(frozen=True)
class _ByHand(Pass):
    """A pass that takes `keys` of a call's meta by hand to a new one in its place."""

    keys: tuple[str, ...]

    def apply(self, program: Program) -> Program:
        graph = program.graph.graph
        old = next(n for n in graph.nodes if n.target is aten.embedding.default)
        with graph.inserting_before(old):
            new = graph.call_function(old.target, old.args)
        new.meta = {key: old.meta[key] for key in self.keys if key in old.meta}
        old.replace_all_uses_with(new)
        graph.erase_node(old)
        program.graph.recompile()
        return program


def test_the_truth_is_not_taken_from_identities() -> None:
    """A new call that was given the identity of another by hand is no copy of it, and that is found."""
    program = captured(NAMED["nano_gpt"])
    assert through(program, [_ByHand(("path", "source"))])
    with pytest.raises(AssertionError, match="kept by nobody's doing"):
        through(program, [_ByHand(("path", "source", "id"))])
