"""FLOPs of a cost are those that torch counts, exactly; what autograd keeps is what a cost says it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import moec
from moec import ir
from moec.cost import Cost
from moec.cost.reading.flop_formulas import flop_formulas
from moec.cost.reading.kinds import is_known
from moec.cost.reading.read import read_operations
from moec.cost.reading.routing import Routing
from moec.plan import Compile, Moe, Plan
from moec.runtime.traffic import count_traffic
from moec.testing.decoders import decoders
from moec.testing.plans import decoders_and_plans
from moec.testing.recipe import DecoderRecipe
from tests.cost.kept import kept_bytes

QUICK = Compile(verify="off")
# A failing recipe is small enough to read; every step of making it smaller would compile a model.
FOUND_AS_THEY_ARE = {"phases": [Phase.explicit, Phase.generate], "database": None}


def counted(program: ir.Program, tokens: Tensor) -> tuple[int, int, list[Tensor]]:
    """FLOPs forward and backward, as torch has them, when all results are pulled on; rows of every expert."""
    with (
        count_traffic() as traffic,
        FlopCounterMode(display=False, custom_mapping=flop_formulas()) as forward,
    ):
        results = program.graph(tokens)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as backward:
        _total(results).backward()
    return forward.get_total_flops(), backward.get_total_flops(), traffic.routed


def counter() -> FlopCounterMode:
    """Torch's own, that knows attention on a CPU and the operators of moec."""
    return FlopCounterMode(display=False, custom_mapping=flop_formulas())


def _total(results: Any) -> Tensor:
    """One number of everything in `results` that has a gradient."""
    leaves = torch.utils._pytree.tree_leaves(results)
    return sum((leaf.sum() for leaf in leaves if leaf.requires_grad), torch.zeros(()))


def read(program: ir.Program, routed: list[Tensor]) -> Cost:
    """The cost of a run whose experts got `routed` rows."""
    routing = Routing.counted([routed]) if routed else None
    return Cost(read_operations(program.graph, None, routing=routing), "training")


def agree(program: ir.Program, tokens: Tensor) -> None:
    """FLOPs of `program` on `tokens`, and no operator whose kind is a guess."""
    *flops, routed = counted(program, tokens)
    cost, sizes = read(program, routed), {"B": tokens.shape[0], "S": tokens.shape[1]}
    assert [one.operator for one in cost.operations if not is_known(one.operator)] == []
    found = [cost.number(amount, **sizes) for amount in (cost.forward_flops, cost.backward_flops)]
    assert found == flops


def agree_on_what_is_kept(program: ir.Program, tokens: Tensor) -> None:
    """Every byte that autograd keeps beside weights and tokens."""
    weights = [*program.parameters(), *program.buffers(), tokens]
    with count_traffic() as traffic:
        saved, _ = kept_bytes(lambda: program.graph(tokens), weights)
    cost = read(program, traffic.routed)
    assert (
        cost.number(sum(one.saved for one in cost.operations), B=tokens.shape[0], S=tokens.shape[1]) == saved
    )


@settings(max_examples=4, **FOUND_AS_THEY_ARE)
@given(decoders(max_layers=2), st.integers(1, 3), st.integers(2, 9))
def test_of_dense_decoders(recipe: DecoderRecipe, batch: int, length: int) -> None:
    program, tokens = moec.compile(recipe.build(), plan=Plan(compile=QUICK)), recipe.tokens(0, batch, length)
    agree(program, tokens)
    agree_on_what_is_kept(program, tokens)


@settings(max_examples=4, **FOUND_AS_THEY_ARE)
@given(decoders_and_plans(max_layers=2, compile=QUICK))
def test_of_experts(pair: tuple[DecoderRecipe, Plan]) -> None:
    """Whatever is dropped: how many rows an expert got is what the run counted. Eager and fused."""
    recipe, plan = pair
    program, tokens = moec.compile(recipe.build(), plan=plan), recipe.tokens()
    for each in (program, program.fused(verify="off")):
        agree(each, tokens)
        agree_on_what_is_kept(each, tokens)


@pytest.fixture(scope="module")
def program() -> ir.Program:
    moe = Moe(layers="1::2", experts=3, top_k=2, residual="learned", capacity_factor="dropless")
    return moec.compile(DecoderRecipe(tied="module").build(), plan=Plan(moe=moe, compile=QUICK))


@pytest.mark.parametrize(
    "frozen", ["wte", "norm", "attn", "up", "down", "router", "bias", "blocks.0", "blocks.1"]
)
def test_of_frozen_weights(program: ir.Program, frozen: str) -> None:
    """No product for a gradient that nobody wants, nothing kept for it; tied weights are frozen together."""
    names = dict(program.named_parameters())
    chosen = [weight for name, weight in names.items() if frozen in name]
    assert chosen
    try:
        for weight in chosen:
            weight.requires_grad_(False)
        agree(program, DecoderRecipe().tokens())
        agree_on_what_is_kept(program, DecoderRecipe().tokens())
    finally:
        for weight in chosen:
            weight.requires_grad_(True)


def test_of_weights_that_are_all_frozen_but_the_first(program: ir.Program) -> None:
    """Backward goes through everything, for one gradient."""
    weights = dict(program.named_parameters())
    embedding = next(name for name in weights if "wte" in name)
    try:
        for name, weight in weights.items():
            weight.requires_grad_(name == embedding)
        agree(program, DecoderRecipe().tokens())
        agree_on_what_is_kept(program, DecoderRecipe().tokens())
    finally:
        for weight in weights.values():
            weight.requires_grad_(True)


def test_of_a_dense_model_before_any_rewrite() -> None:
    """The user's own module, of which moec knows nothing, multiplies as much as its program is said to."""
    recipe = DecoderRecipe(num_layers=2)
    model, tokens = recipe.build(), recipe.tokens()
    with counter() as forward:
        logits = recipe.logits(model, tokens)
    with counter() as backward:
        logits.sum().backward()
    program = moec.compile(recipe.build(), plan=Plan(compile=QUICK))
    cost = read(program, [])
    amounts = (cost.forward_flops, cost.backward_flops)
    assert [cost.number(amount, B=2, S=9) for amount in amounts] == [
        forward.get_total_flops(),
        backward.get_total_flops(),
    ]


@pytest.mark.parametrize("attention", ["flash", "math"])
def test_of_either_kind_of_attention(program: ir.Program, attention: Any) -> None:
    """What runs is told when it is asked for."""
    sdpa = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel({"flash": sdpa.FLASH_ATTENTION, "math": sdpa.MATH}[attention]):
        *flops, routed = counted(program, DecoderRecipe().tokens())
    routing = Routing.counted([routed])
    cost = Cost(read_operations(program.graph, None, attention=attention, routing=routing), "training")
    assert [cost.number(each, B=2, S=9) for each in (cost.forward_flops, cost.backward_flops)] == flops


def test_flash_computes_the_scores_again(program: ir.Program) -> None:
    """One product of five more, backward."""
    flash, math = (
        Cost(read_operations(program.graph, None, attention=kind), "training") for kind in ("flash", "math")
    )
    attentions = [one for one in flash.operations if one.operator == "aten::scaled_dot_product_attention"]
    scores = sum(one.forward.products[0].flops for one in attentions)
    assert len(attentions) == 2
    assert flash.forward_flops == math.forward_flops
    assert (flash.backward_flops - math.backward_flops - scores).expand() == 0
