"""The fusions: same function, readable text, reasons for what stays, and a broken one is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx

import moec
from moec.errors import PassError, VerifyError
from moec.ir import regions
from moec.passes.fuse_gate import FuseGate
from moec.passes.fuse_mix import FuseMix
from moec.passes.fuse_moe_ffn import FuseMoeFfn
from moec.passes.pipeline import cached, fused_decoder
from moec.passes.runner import Runner
from moec.plan import Plan
from moec.testing import DecoderRecipe
from moec.testing.golden import assert_golden
from moec.testing.parts.feed_forward import FeedForwardRecipe
from moec.testing.plans import decoders_and_plans
from moec.testing.same_function import compare, compare_gradients

ops = torch.ops.moec
aten = torch.ops.aten
GATED = FeedForwardRecipe(hidden=6, gating="separate", activation="silu")
RECIPE = DecoderRecipe(num_layers=2, ffn=GATED)
PLAN: dict[str, Any] = {
    "moe": {
        "layers": "1", "experts": 4, "top_k": 2, "residual": "learned", "init": "noise", "init_noise": 0.5,
        "router_std": 1.0, "capacity_factor": 1.0, "z_loss": 0.001, "gate": "normalized",
    }
}  # fmt: skip


def program(recipe: DecoderRecipe = RECIPE, **changes: Any) -> moec.Program:
    plan = {**PLAN, "moe": {**PLAN["moe"], **changes}}
    return moec.compile(recipe.build(0, torch.float64), plan, verify="off")


def calls(root: fx.GraphModule, target: Any) -> list[fx.Node]:
    modules = [module for module in root.modules() if isinstance(module, fx.GraphModule)]
    return [node for module in modules for node in module.graph.nodes if node.target is target]


def learned(subject: moec.Program, tokens: Tensor, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss terms, and the gradient of every parameter, by its public name."""
    subject.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    terms: dict[str, Any] = dict(subject.loss_terms(tokens))
    terms["loss"].backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in subject.named_parameters()}
    counts = terms.pop("counts", {})
    return {**terms, **counts}, gradients


# the same function


@settings(max_examples=8)
@given(decoders_and_plans(float32=False, interfaces=("logits",), max_layers=2))
def test_random_decoders_and_plans(pair: tuple[DecoderRecipe, Plan]) -> None:
    """Loss terms, counts and every gradient to 1e-10, in both modes, from the same weights and draws."""
    recipe, plan = pair
    whole = moec.compile(recipe.build(0, torch.float64), plan, verify="off")
    larger = whole.fused(verify="full")
    assert all(c.verdict == "proved" for c in larger.certificates[len(whole.certificates) :])
    assert [n for n, _ in larger.named_parameters()] == [n for n, _ in whole.named_parameters()]
    tokens = recipe.tokens(1, 2, 7)
    for training in (True, False):
        needed, right = learned(whole.train(training), tokens, 3)
        needed = {name: value.clone() for name, value in needed.items()}
        right = {name: value.clone() for name, value in right.items()}
        found, left = learned(larger.train(training), tokens, 3)
        compare(found, needed, 1e-10)
        compare_gradients(left, right, 1e-10)


@settings(max_examples=5)
@given(decoders_and_plans(float32=False, dropout=False, interfaces=("logits",), max_layers=2))
def test_random_decoders_with_memory(pair: tuple[DecoderRecipe, Plan]) -> None:
    """A decoder of any of them, fused, gives what it gave; each pass is proved on a step."""
    recipe, plan = pair
    whole = moec.compile(recipe.build(0, torch.float64), plan, verify="off").eval()
    derived = Runner(verify="off").run(whole.fork(), cached(16))
    larger = Runner(verify="full").run(derived.fork(), fused_decoder())
    added = larger.certificates[len(derived.certificates) :]
    assert {c.verdict for c in added if c.rewrite != "complete_fused"} == {"proved"}
    assert not calls(larger.graph, aten.dropout.default)
    assert not calls(larger.graph, ops.jitter.default)


@pytest.mark.parametrize("residual", ["none", "sum", "learned"])
def test_what_is_left(residual: str) -> None:
    """One operator for the choice, one for the rows; the sum of the branches inside."""
    larger = program(residual=residual).fused().graph
    for gone in (ops.router, ops.route, ops.assign, ops.dispatch, ops.grouped_linear, ops.combine):
        assert not calls(larger, gone.default)
    (layer,) = calls(larger, ops.moe_ffn.default)
    assert len(layer.args) == {"none": 7, "sum": 8, "learned": 9}[residual]
    assert len(calls(larger, ops.gate.default)) == 1


def test_the_weights_are_shared_and_train() -> None:
    """Same parameters under the same names; an optimizer's step on one is seen by the other."""
    whole = program()
    larger = whole.fused()
    assert dict(larger.named_parameters()).keys() == dict(whole.named_parameters()).keys()
    assert all(larger.get_parameter(n) is p for n, p in nn_named(whole).items())
    tokens = RECIPE.tokens(1, 2, 7)
    optimizer = torch.optim.SGD(larger.parameters(), lr=0.1)
    larger.loss(tokens).backward()
    optimizer.step()
    whole.eval(), larger.eval()
    compare({"logits": larger(tokens)}, {"logits": whole(tokens)}, 1e-10)


def nn_named(subject: moec.Program) -> dict[str, Tensor]:
    """Parameters under their structural names."""
    return dict(torch.nn.Module.named_parameters(subject))


# what is read


@pytest.mark.golden
def test_golden() -> None:
    """A residual layer, fused."""
    larger = program().fused(verify="off")
    assert_golden(str(larger), Path(__file__).parent.parent / "golden" / "text_fused.txt")


def test_text_reads_back_and_artifacts_hold_it(tmp_path: Path) -> None:
    whole = program().eval()
    larger, tokens = whole.fused(), RECIPE.tokens(1, 2, 7)
    for subject in (whole, larger):
        again = moec.load(subject.save(tmp_path / subject.stage)).eval()
        assert str(again) == str(subject)
        compare({"logits": again(tokens)}, {"logits": whole(tokens)}, 1e-10)
        assert str(again.fused(verify="full")).partition("\n")[2] == str(larger).partition("\n")[2]


@pytest.mark.parametrize(
    ("recipe", "changes", "says"),
    [
        (RECIPE, {}, "fuse_gate: moe_1: router, route and assign in one operator, moec.gate"),
        (RECIPE, {}, "3 products, `lambda gate, up: silu(gate) * up` and combine in one operator"),
        (RECIPE, {}, "fuse_mix: moe_1: the dense feed-forward is mixed in by moec.moe_ffn"),
        (RECIPE, {"residual": "sum"}, "fuse_mix: moe_1: the dense feed-forward is added in by moec.moe_ffn"),
        (
            replace(RECIPE, ffn=replace(GATED, hidden_dropout=0.1)), {},
            "` is dropout between the products, which draws numbers",
        ),
        (
            replace(RECIPE, ffn=replace(GATED, hidden_dropout=0.1)), {},
            "fuse_mix: moe_1: the dense feed-forward is added outside: its products are not in one operator",
        ),
    ],
)  # fmt: skip
def test_explains(recipe: DecoderRecipe, changes: dict[str, Any], says: str) -> None:
    notes = program(recipe, **changes).fused(verify="off").explain().splitlines()
    assert any(line.startswith("note: fuse_") and says in line for line in notes)


# what is refused


def with_layer(change: Callable[[fx.Graph], None], **changes: Any) -> moec.Program:
    """A program whose expert layer was changed by hand."""
    changed = program(**changes)
    module = regions(changed.graph, "moe")["moe_1"]
    change(module.graph)
    module.recompile()
    return changed


def find(graph: fx.Graph, target: Any) -> fx.Node:
    return next(node for node in graph.nodes if node.target is target)


def test_a_value_that_is_read_elsewhere() -> None:
    def change(graph: fx.Graph) -> None:
        rows, combined = find(graph, ops.dispatch.default), find(graph, ops.combine.default)
        with graph.inserting_after(combined):
            extra = graph.call_function(aten.sum.default, (rows,))
        end = next(node for node in reversed(graph.nodes) if node.op == "output")
        with graph.inserting_before(end):
            total = graph.call_function(aten.add.Tensor, (end.args[0][1], extra))
        end.args = ((end.args[0][0], total, *end.args[0][2:]),)

    larger = with_layer(change).fused(verify="full")
    assert calls(larger.graph, ops.grouped_linear.default)
    assert any("`rows` is also read by `" in note for note in larger.ledger.notes)


def test_another_operator_between_the_products() -> None:
    def change(graph: fx.Graph) -> None:
        node = find(graph, aten.silu.default)
        with graph.inserting_before(node):
            made = graph.call_function(aten.softmax.int, (node.args[0], -1))
        node.replace_all_uses_with(made)
        graph.erase_node(node)

    larger = with_layer(change).fused(verify="full")
    assert any("(aten.softmax.int) has no word in formulas" in note for note in larger.ledger.notes)


# a broken fusion is caught


class Broken(FuseMoeFfn):
    """Does what the pass does, and then something to each `moe_ffn`."""

    change: Callable[[fx.Node], None]

    def apply(self, program: Any) -> Any:
        done = super().apply(program)
        for node in calls(done.graph, ops.moe_ffn.default):
            type(self).change(node)
        for module in done.graph.modules():
            if isinstance(module, fx.GraphModule):
                module.recompile()
        return done


def swap_ups(node: fx.Node) -> None:
    gate, up, down = node.args[4]  # type: ignore[misc]
    node.update_arg(4, [up, gate, down])


def other_formula(node: fx.Node) -> None:
    node.update_arg(6, "lambda gate, up: gelu(gate) * up")


def forget_a_bias(node: fx.Node) -> None:
    node.update_arg(5, [None, *node.args[5][1:]])  # type: ignore[misc,index]


def weights_of_ones(node: fx.Node) -> None:
    with node.graph.inserting_before(node):
        ones = node.graph.call_function(aten.ones_like.default, (node.args[1],))
    node.update_arg(1, ones)


def cut_the_gradient(node: fx.Node) -> None:
    with node.graph.inserting_before(node):
        cut = node.graph.call_function(aten.detach.default, (node.args[1],))
    node.update_arg(1, cut)


@pytest.mark.parametrize(
    "change", [swap_ups, other_formula, forget_a_bias, weights_of_ones, cut_the_gradient]
)
def test_a_broken_fusion_is_caught(change: Callable[[fx.Node], None]) -> None:
    """Also where the experts are equal copies at first, and the router has no opinion."""
    broken = type("Broken", (Broken,), {"change": staticmethod(change)})
    recipe = replace(RECIPE, ffn=replace(GATED, bias=True))
    subject = program(recipe, init="copy", router_std=0.0, residual="none")
    with pytest.raises(VerifyError, match="pass broken"):
        Runner(verify="full").run(subject, [FuseGate(), broken()])


def test_a_mix_that_is_the_wrong_way_round_is_caught() -> None:
    class Turned(FuseMix):
        def apply(self, program: Any) -> Any:
            done = super().apply(program)
            (mix,) = regions(done.graph, "mix").values()
            end = next(node for node in reversed(mix.graph.nodes) if node.op == "output")
            with mix.graph.inserting_before(end):
                turned = mix.graph.call_function(aten.flip.default, (end.args[0], [-1]))
            end.args = (turned,)
            mix.recompile()
            return done

    subject = program(init="copy", router_std=0.0)
    with pytest.raises(VerifyError, match="pass turned"):
        Runner(verify="full").run(subject, [FuseGate(), FuseMoeFfn(), Turned()])


def test_a_gate_with_another_choice_is_caught() -> None:
    class Other(FuseGate):
        def apply(self, program: Any) -> Any:
            done = super().apply(program)
            for node in calls(done.graph, ops.gate.default):
                node.update_arg(4, "probability")
            for module in regions(done.graph, "moe").values():
                module.recompile()
            return done

    with pytest.raises(VerifyError, match="pass other"):
        Runner(verify="full").run(program(), [Other()])


# the backend


def test_backend() -> None:
    """The text stays the readable one, the fused graph runs, and both modes follow."""
    model, tokens = RECIPE.build(0, torch.float64), RECIPE.tokens(1, 2, 7)
    plain = moec.compile(model, PLAN, verify="off")
    quick = moec.compile(model, {**PLAN, "compile": {"backend": "fused"}})
    assert str(quick) == str(plain)
    assert quick.executed is not quick.graph
    assert "note: fuse_moe_ffn" in quick.explain()
    assert "note: fuse_moe_ffn" not in plain.explain()
    for training in (True, False):
        quick.train(training)
        plain.train(training)
        found, left = learned(quick, tokens, 5)
        needed, right = learned(plain, tokens, 5)
        compare(found, needed, 1e-10)
        compare_gradients(left, right, 1e-10)
        assert quick.executed.training == training


def test_backend_follows_the_weights() -> None:
    """After a change of dtype, or a state that is assigned, the fused graph runs on what is there now."""
    model, tokens = RECIPE.build(0, torch.float64), RECIPE.tokens(1, 2, 7)
    quick = moec.compile(model, PLAN, verify="off", backend="fused").eval()
    before = quick(tokens)
    state = {name: 2 * value for name, value in quick.state_dict().items()}
    quick.load_state_dict(state, assign=True)
    assert not torch.allclose(quick(tokens), before)
    compare({"logits": quick(tokens)}, {"logits": quick.graph(tokens)[0]}, 1e-10)
    assert quick.float()(tokens).dtype == torch.float32


@pytest.mark.parametrize("parallel", [{"expert": 2}, {"expert": 2, "tensor": 2}, {"expert": 1}])
@pytest.mark.parametrize("capacity", ["dropless", 1.0])
def test_on_ranks(parallel: dict[str, int], capacity: object) -> None:
    """Ranks fuse what does not travel, and say why the rest stays; all together are the program."""
    recipe = replace(RECIPE, vocab=24)
    plan = {"moe": {**PLAN["moe"], "capacity_factor": capacity}, "parallel": parallel}
    model = recipe.build(0, torch.float64)
    placed = moec.compile(model, plan, verify="off", backend="fused", world=2 * parallel.get("tensor", 1))
    result = placed.simulate(recipe.tokens(1, 4, 6))
    assert result.max_error <= 1e-10, result
    assert result.agrees
    notes = " ".join(placed.partition(0).fused().ledger.notes)
    assert ("moec.admit" in notes) == (capacity == 1.0)
    assert ("travel" in notes) == (parallel["expert"] == 2)


def test_a_fused_program_writes_too() -> None:
    """Derived from the fused program or from the readable one: the same texts, and no capacity in either."""
    whole = program(capacity_factor=0.5).eval()
    larger, tokens = whole.fused(), RECIPE.tokens(1, 2, 5)
    assert torch.equal(larger.generate(tokens, max_new_tokens=4), whole.generate(tokens, max_new_tokens=4))


def test_fused_again_nothing_changes() -> None:
    larger = program().fused()
    again = larger.fused(verify="full")
    assert str(again) == str(larger)
    assert not [note for note in again.ledger.notes[len(larger.ledger.notes) :] if "moe" in note]


def test_a_fused_program_is_not_dealt_out() -> None:
    with pytest.raises(PassError, match=r"program.partition\(rank\).fused\(\)"):
        program().fused(verify="off").partition(0)
