"""All ranks in one process: the numbers of the whole program, and a word when they are not."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import moec
from examples.gpt import GPT, GPTConfig
from moec.all_ranks import all_parts
from moec.errors import DataError, MeshError, PassError
from moec.local_program import LocalProgram
from moec.plan import Plan
from moec.program import Program
from moec.runtime.ops.sent import Traffic
from moec.runtime.traffic_report import traffic_table
from moec.testing import decoders_and_plans
from moec.testing.recipe import DecoderRecipe

TOP_2 = {"layers": "1::2", "experts": 4, "top_k": 2, "residual": "learned", "capacity_factor": 1.0}
PYRAMID = {"layers": "1::2", "experts": 32, "override": [{"layers": "-1:", "experts": 64}]}


@cache
def placed(layers: int = 2, world: int = 4, moe: str = "top_2", tensor: int = 2, expert: int = 4) -> Program:
    """A small GPT in fp64 on a mesh; nobody changes it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=51, seq=16, layers=layers, width=16, heads=4, dropout=0.1)).double()
    plan = {"compile": {"dtype": "fp64"}, "parallel": {"tensor": tensor, "expert": expert}}
    sparse = {"top_2": {"moe": TOP_2}, "pyramid": {"moe": PYRAMID}, "dense": {}}[moe]
    return moec.compile(model, plan | sparse, world=world, verify="off")


def words(batch: int, sequence: int = 8) -> torch.Tensor:
    """Some tokens."""
    return torch.randint(51, (batch, sequence))


def test_four_ranks_are_the_whole_program() -> None:
    """Five sequences on two data ranks; dropout stays out, weights, gradients and modes stay as they are."""
    program, tokens, before = placed(), words(5), torch.get_rng_state()
    made = program.simulate(tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert program.training
    assert all(value.grad is None for value in program.parameters())
    assert made.agrees, made
    program.eval()
    try:
        assert torch.allclose(made.logits, program(tokens), rtol=0, atol=1e-12)
        assert made.loss == pytest.approx(program.loss(tokens).item(), abs=1e-12)
    finally:
        program.train()
    named = dict(program.named_parameters())
    assert {name: value.shape for name, value in made.gradients.items()} == {
        name: value.shape for name, value in named.items()
    }
    assert made.max_error < 1e-13


def test_it_prints_what_it_found() -> None:
    said = str(placed().simulate(words(4)))
    assert said.startswith("4 ranks: data 2 × tensor 2 · 4 sequences of 8 tokens")
    assert "the same as one process" in said
    assert "NOT" not in said
    for word in ("balance", "gradients", "rows computed", "moe_1", "moec.exchange", "by the graph"):
        assert word in said
    assert "differs" not in said


def test_rows_are_those_of_the_experts() -> None:
    made = placed().simulate(words(6), gradients=False)
    assert made.rows() == {"moe_1": made.counts["moe_1"].tolist()}  # four ranks, four experts
    assert sum(made.rows()["moe_1"]) > 0
    assert not made.gradients
    assert {kind.direction for one in made.traffic for kind in one.sent} == {"forward"}


def test_targets_are_dealt_out_with_the_tokens() -> None:
    tokens, targets = words(3), words(3)
    targets[0, :5] = -100
    made = placed().simulate(tokens, targets, gradients=False)
    assert made.agrees, made
    program = placed().eval()
    try:
        assert made.loss == pytest.approx(program.loss(tokens, targets).item(), abs=1e-12)
    finally:
        program.train()


def test_ranks_without_tokens() -> None:
    made = placed().simulate(words(1))
    assert made.agrees, made


def test_a_dense_program() -> None:
    made = placed(moe="dense", tensor=4).simulate(words(2))
    assert made.agrees, made
    assert not made.counts
    assert "rows computed" not in str(made)


def test_sixty_four_ranks_of_a_pyramid() -> None:
    made = placed(4, 64, "pyramid", 2, 64).simulate(words(40))
    assert made.agrees, made
    assert {name: len(rows) for name, rows in made.rows().items()} == {"moe_1": 64, "moe_3": 64}
    assert {name: sum(rows) for name, rows in made.rows().items()} == {"moe_1": 320, "moe_3": 320}
    assert sum(not one.shape[0] for one in words(40).tensor_split(64)) == 24  # some ranks have no sequence
    assert {"expert_32_between", "expert_64_inside"} <= {kind.axis for kind in made.traffic[0].sent}


def test_a_model_that_cannot_do_without_tokens_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a reshape leaves a size open, which without elements could be any."""
    execute = LocalProgram._execute

    def reshaped(self: LocalProgram, tokens: torch.Tensor) -> object:
        tokens.reshape(tokens.shape[0], -1)
        return execute(self, tokens)

    monkeypatch.setattr(LocalProgram, "_execute", reshaped)
    with pytest.raises(DataError, match="1 sequences, none for rank 2"):
        placed().simulate(words(1))
    assert placed().simulate(words(2)).agrees


def test_all_parts_are_the_partitions() -> None:
    program = placed()
    for rank, part in enumerate(all_parts(program)):
        alone = program.partition(rank).state_dict()
        assert part.rank == rank
        assert part.state_dict().keys() == alone.keys()
        assert all(torch.equal(value, alone[name]) for name, value in part.state_dict().items())


@settings(max_examples=3)
@given(
    decoders_and_plans(float32=False, max_experts=8, max_layers=2, interfaces=("logits",)),
    st.sampled_from((2, 4, 6)),
    st.fixed_dictionaries({
        "tensor": st.sampled_from((1, 2)), "expert": st.integers(1, 4), "node": st.sampled_from((1, 2, 8)),
        "all_to_all": st.sampled_from(("auto", "flat", "hierarchical", "coordinated")),
    }),
)  # fmt: skip
def test_any_decoder_agrees_and_sends_what_its_graph_says(
    pair: tuple[DecoderRecipe, Plan], world: int, parallel: dict[str, object]
) -> None:
    recipe, plan = pair
    settings_ = {**plan.model_dump(exclude_none=True), "parallel": parallel, "compile": {"dtype": "fp64"}}
    model = recipe.build(seed=0, dtype=torch.float64)
    try:
        program = moec.compile(model, settings_, world=world, verify="off")
    except moec.PlanError:
        return  # a mesh that does not fit the model; tests of the placement say when
    made = program.simulate(recipe.tokens(batch=7, length=4))
    assert made.agrees, made


@pytest.mark.parametrize("what", ["blocks.0.attention.qkv.weight", "moe_1.up.weight", "gradient"])
def test_a_rank_that_computes_something_else_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of one rank is another; or a gradient is twice what it should be."""

    def wrong(program: Program) -> list[LocalProgram]:
        parts = all_parts(program)
        if what == "gradient":
            for value in parts[2].parameters():
                value.register_hook(lambda grad: 2 * grad)
            return parts
        value = dict(parts[1].named_parameters())[what]
        value.data = value.data.clone()
        value.data.view(-1)[3] += 1e-3
        return parts

    monkeypatch.setattr("moec.simulate.all_parts", wrong)
    made = placed().simulate(words(4))
    assert not made.agrees
    assert made.max_error > 1e-9
    assert "NOT the same as one process" in str(made)
    assert made.traffic_agrees


def test_traffic_that_differs_from_the_graph_is_marked() -> None:
    made = placed().simulate(words(4), gradients=False)
    counted, predicted = made.traffic[0], made.predicted[0]
    kind = next(kind for kind in counted.sent if kind.operator == "moec.exchange")
    rows = counted.to_json()
    for row in rows:
        if row[2] == "moec.exchange":
            row[5] += 1
    other = Traffic.of_json([*rows, ["forward", "data", "moec.new", 1, 1, 1]])
    console = Console(width=120)
    with console.capture() as said:
        console.print(traffic_table(other, predicted))
    lines = {line.split()[1]: line for line in said.get().splitlines() if len(line.split()) > 1}
    assert f"{predicted.sent[kind].bytes:,} in" in lines["moec.exchange"]
    assert "differs" in lines["moec.exchange"]
    assert lines["moec.new"].split()[-1] == "–"
    assert "differs" not in lines["moec.unshare"]


def test_what_cannot_be_simulated() -> None:
    plain = moec.compile(GPT(GPTConfig(vocab=51, seq=16, layers=1, width=16, heads=4)), verify="off")
    with pytest.raises(PassError, match="not placed"):
        plain.simulate(words(2))
    with pytest.raises(PassError, match="the part of rank 1"):
        placed().partition(1).simulate(words(2))
    with pytest.raises(PassError, match="weights on meta"):
        placed().partition(1).whole.simulate(words(2))
    with pytest.raises(MeshError, match="still running after"):
        placed().simulate(words(2), timeout=1e-4)
