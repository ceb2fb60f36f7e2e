"""Hidden states of a program against those of the model it was made from, read by hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import moec
from moec.errors import PassError, VerifyError
from moec.ir.bind import bind
from moec.passes.runner import Runner
from moec.passes.tap_hidden import TapHidden
from moec.program import Program
from moec.runtime.simulated import run_ranks
from moec.testing import DecoderRecipe, decoders, decoders_and_plans
from moec.testing.recipe import LogitsOnly
from moec.testing.tolerances import error_of
from tests.runtime.rank_runs import PYRAMID, compiled, plan


def block_outputs(recipe: DecoderRecipe, model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """What each layer gives, in order; layers that share a module are heard each time."""
    heard: list[Tensor] = []
    blocks = {id(block): block for block in model.get_submodule(recipe.names.blocks).children()}
    hooks = [b.register_forward_hook(lambda _m, _a, out: heard.append(out)) for b in blocks.values()]
    with torch.no_grad():
        recipe.logits(model.eval(), tokens)
    for hook in hooks:
        hook.remove()
    return heard


def assert_layers_are_heard(recipe: DecoderRecipe, planned: Any) -> None:
    model, tokens = recipe.build(seed=0, dtype=torch.float64), recipe.tokens()
    needed = block_outputs(recipe, model, tokens)
    assert len(needed) == recipe.num_layers
    program = moec.compile(LogitsOnly(recipe, model), planned, verify="off").eval()
    tapped = program.tapped(range(recipe.num_layers))
    with torch.no_grad():
        logits, terms = tapped.run(tokens)
        plain, others = program.run(tokens)
    assert torch.equal(logits, plain)
    assert {*terms} == {*others, "hidden"}
    for layer, state in enumerate(needed):
        assert error_of(terms["hidden"][layer], state) <= 1e-10, f"layer {layer}"


@given(decoders(float32=False, min_layers=1, max_layers=3))
@settings(max_examples=6)
def test_dense_layers(recipe: DecoderRecipe) -> None:
    assert_layers_are_heard(recipe, None)


@given(decoders_and_plans(float32=False, exact_only=True, dropout=False))
@settings(max_examples=4)
def test_sparse_layers(drawn: tuple[DecoderRecipe, Any]) -> None:
    """Experts that are copies of the feed-forward: hidden states are the dense model's."""
    assert_layers_are_heard(*drawn)


@pytest.mark.parametrize("backend", ["eager", "fused"])
@pytest.mark.parametrize("training", [False, True])
def test_everything_else_is_what_it_was(backend: str, training: bool) -> None:
    """Dropout and routing draw the same numbers; loss terms and gradients are equal to the bit."""
    program = compiled(plan({**PYRAMID, "noise": "rsample"}), dropout=0.2).train(training)
    program.backend = backend
    tokens = torch.randint(256, (2, 8))
    tapped = program.tapped([1])
    assert tapped.training == training
    assert tapped.backend == backend
    told = []
    for one in (program, tapped):
        torch.manual_seed(3)
        terms = one.loss_terms(tokens)
        told.append((terms, torch.autograd.grad(terms["loss"], list(program.parameters()))))
    (terms, gradients), (others, other_gradients) = told
    assert {*terms} == {*others}
    assert all(torch.equal(terms[name], others[name]) for name in ("loss", "task", "balance", "z"))  # type: ignore[literal-required]
    assert all(map(torch.equal, gradients, other_gradients))


@pytest.mark.nightly
def test_compiled_as_a_whole() -> None:
    program = compiled(plan()).eval()
    tokens = torch.randint(256, (2, 8))
    needed = program.tapped([0, 1]).run(tokens)[1]["hidden"]
    program.backend = "aot_eager"
    program._tapped = ()
    found = program.tapped([0, 1]).run(tokens)[1]["hidden"]
    assert all(error_of(found[layer], needed[layer]) <= 1e-10 for layer in (0, 1))


def test_weights_are_shared_and_tapped_programs_kept() -> None:
    program = compiled(plan())
    tapped = program.tapped([1, 0])
    assert program.tapped([0, 1]) is tapped
    assert program.taps == (tapped,)
    assert dict(tapped.named_parameters()).keys() == dict(program.named_parameters()).keys()
    assert all(map(torch.equal, tapped.parameters(), program.parameters()))
    assert {p.data_ptr() for p in tapped.parameters()} == {p.data_ptr() for p in program.parameters()}
    assert program.stage == tapped.stage
    assert tapped.tapped([0, 1]) is tapped
    program.to(torch.float64)
    assert program.taps == ()


def test_the_text_says_it_and_runs() -> None:
    program = compiled(plan()).eval()
    tapped = program.tapped([1])
    assert '"hidden": {1: x_1b}}' in tapped.text()
    tokens = torch.randint(256, (1, 5))
    defined: dict[str, Any] = {}
    exec(tapped.text(), defined)
    found = bind(defined, tapped.graph)(tokens)
    assert torch.equal(found[1]["hidden"][1], tapped.run(tokens)[1]["hidden"][1])


@dataclass(frozen=True)
class OneTooFar(TapHidden):
    """Gives what the layer before gave."""

    def apply(self, program: Any) -> Any:
        wrong = TapHidden(tuple(layer - 1 for layer in self.layers)).apply(program)
        end = next(iter(reversed(wrong.graph.graph.nodes)))
        logits, terms = end.args[0]
        moved = {layer + 1: node for layer, node in terms["hidden"].items()}
        end.args = ((logits, {**terms, "hidden": moved}),)
        wrong.graph.recompile()
        return wrong


def test_a_wrong_layer_is_caught() -> None:
    with pytest.raises(VerifyError, match="hidden states of layer 1 differ"):
        Runner(verify="full").run(compiled(plan()).fork(), [OneTooFar((1,))])


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(2, {"tensor": 2}), (2, {"data": 2, "expert": 2}), (4, {"tensor": 2, "expert": 2})],
)
def test_ranks_hear_their_own_tokens(world: int, parallel: dict[str, int]) -> None:
    placed = compiled(plan(**parallel), world).eval()
    assert placed.layout is not None
    mesh, tokens = placed.layout.mesh, torch.randint(256, (3, 8))
    with torch.no_grad():
        needed = placed.tapped([0, 1]).run(tokens)[1]["hidden"]

        def body(rank: int) -> dict[int, Tensor]:
            mine = tokens.tensor_split(mesh.data)[mesh.coordinate("data", rank)]
            states: dict[int, Tensor] = placed.partition(rank).eval().tapped([0, 1]).run(mine)[1]["hidden"]
            return states

        told = run_ranks(mesh, body)
    for rank, states in enumerate(told):
        for layer, state in needed.items():
            mine = state.tensor_split(mesh.data)[mesh.coordinate("data", rank)]
            assert error_of(states[layer], mine, floor=float(state.abs().max())) <= 1e-10, (rank, layer)


def refusal(program: Program, layers: Any) -> str:
    with pytest.raises(PassError) as caught:
        program.tapped(layers)
    return str(caught.value)


def test_what_cannot_be_tapped() -> None:
    program = compiled(plan())
    assert "layer 2\n  needed  a layer from 0 to 1" in refusal(program, [0, 2])
    assert "layer -1" in refusal(program, [-1])
    assert "layers []" in refusal(program, [])
    assert "gives the hidden states of [1]" in refusal(program.tapped([1]), [0])
    assert "a fused program" in refusal(program.fused(), [0])


def test_a_tapped_program_is_not_saved(tmp_path: Any) -> None:
    with pytest.raises(PassError, match="the one it was made from"):
        compiled(plan()).tapped([0]).save(tmp_path / "x")
    assert not (tmp_path / "x").exists()
