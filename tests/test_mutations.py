"""Rewrites with a deliberate mistake are each caught by `verify="full"`, which names the pass.

Each mutation is a mistake that a person could make in the pass, put in place by monkeypatching; the last
test sees that the passes without one are let through.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import moec
from moec.errors import VerifyError
from moec.ir import Origin, Program
from moec.ir.graphs import output
from moec.passes import branch_experts, build_experts, collect_terms, lift_experts
from moec.passes.build_experts import ExpertLayer
from moec.testing import DecoderRecipe
from moec.testing.parts.feed_forward import FeedForwardRecipe

aten, ops = torch.ops.aten, torch.ops.moec
Edit = Callable[[fx.GraphModule], None]

GATED = DecoderRecipe(num_layers=2, ffn=FeedForwardRecipe(hidden=12, gating="separate", activation="silu"))
EXACT = {"layers": "all", "experts": 3, "top_k": 2, "gate": "normalized", "residual": "learned"}
LOSSY = {"layers": "all", "experts": 3, "top_k": 2, "gate": "probability", "residual": "sum", "init": "noise"}
FULL = {
    "layers": "all",
    "experts": 3,
    "top_k": 2,
    "gate": "sigmoid",
    "capacity_factor": 0.5,
    "min_capacity": 1,
}
SPLIT = {"layers": "all", "experts": 3, "top_k": 3, "gate": "normalized", "init": "split"}


def _compile(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> moec.Program:
    return moec.compile(GATED.build(0, dtype), {"moe": settings}, verify="full")


def _caught(settings: dict[str, Any], by: str, dtype: torch.dtype = torch.float32) -> VerifyError:
    with pytest.raises(VerifyError, match=f"pass {by}") as caught:
        _compile(settings, dtype)
    return caught.value


# mistakes in the graph of an expert layer


def _edit_layers(monkeypatch: pytest.MonkeyPatch, edit: Edit) -> None:
    """Let `edit` change each lifted layer before it is put in place."""
    build = lift_experts.build_experts

    def mutated(*args: Any) -> ExpertLayer:
        layer = build(*args)
        edit(layer.module)
        layer.module.graph.lint = lambda: None  # type: ignore[method-assign]
        layer.module.recompile()
        return layer

    monkeypatch.setattr(lift_experts, "build_experts", mutated)


def _calls(module: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is target]


def _call(module: fx.GraphModule, target: Any) -> fx.Node:
    return _calls(module, target)[0]


def _item(module: fx.GraphModule, of: Any, position: int) -> fx.Node:
    return next(
        n for n in _calls(module, operator.getitem) if n.args[0].target is of and n.args[1] == position
    )


def _after(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Put `target(node, *args)` between `node` and everything that reads it."""
    with node.graph.inserting_after(node):
        made = node.graph.call_function(target, (node, *args))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made


def wrong_expert_index(module: fx.GraphModule) -> None:
    """Rows are sorted by the choice of another expert."""
    experts = _item(module, ops.route.default, 1)
    table = _call(module, ops.assign.default)
    with module.graph.inserting_before(table):
        shifted = module.graph.call_function(aten.add.Tensor, (experts, 1))
        table.args = (module.graph.call_function(aten.remainder.Scalar, (shifted, 3)), *table.args[1:])


def gate_not_normalised(module: fx.GraphModule) -> None:
    """The chosen probabilities as they are."""
    route = _call(module, ops.route.default)
    route.args = (*route.args[:3], "probability", *route.args[4:])


def gradient_detached(module: fx.GraphModule) -> None:
    """The router learns nothing."""
    _after(_call(module, ops.router.default), aten.detach.default)


def hidden_gradient_detached(module: fx.GraphModule) -> None:
    """The up products learn nothing."""
    _after(_call(module, aten.silu.default), aten.detach.default)


def bias_dropped(module: fx.GraphModule) -> None:
    """The down product loses its bias."""
    down = _calls(module, ops.grouped_linear.default)[-1]
    down.args = (down.args[0], down.args[1], None, down.args[3])


def combine_weights_ignored(module: fx.GraphModule) -> None:
    """All chosen experts weigh the same."""
    combine, weights = _call(module, ops.combine.default), _item(module, ops.route.default, 0)
    with module.graph.inserting_before(combine):
        even = module.graph.call_function(aten.full_like.default, (weights, 0.5))
    combine.args = (combine.args[0], even, *combine.args[2:])


def router_reads_rows(module: fx.GraphModule) -> None:
    """The router sees its input rolled by one token."""
    router = _call(module, ops.router.default)
    with module.graph.inserting_before(router):
        rolled = module.graph.call_function(aten.roll.default, (router.args[0], [1], [0]))
    router.args = (rolled, *router.args[1:])


def up_and_gate_swapped(module: fx.GraphModule) -> None:
    """The activation sits on the wrong product."""
    first, second = _calls(module, ops.grouped_linear.default)[:2]
    for left, right in zip(first.args[1:3], second.args[1:3], strict=True):
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        left.target, right.target = right.target, left.target


def dropped_rows_kept(module: fx.GraphModule) -> None:
    """Rows beyond an expert's capacity go through it all the same."""
    table = _call(module, ops.assign.default)
    table.args = (*table.args[:2], 0.0, 0.0, *table.args[4:])


def dropped_rows_count(module: fx.GraphModule) -> None:
    """Rows that found no room are added in with the last expert's."""
    combine = _call(module, ops.combine.default)
    counts = combine.args[3]
    with module.graph.inserting_before(combine):
        more = module.graph.call_function(aten.mul.Tensor, (counts, 2))
    combine.args = (*combine.args[:3], more)


def split_scale_missing(module: fx.GraphModule) -> None:
    """A slice does not stand for the whole."""
    whole = next(node for node in _calls(module, aten.mul.Tensor) if node.args[1] == 3.0)
    whole.args = (whole.args[0], 1.0)


def balance_before_bias(module: fx.GraphModule) -> None:
    """The balance term is computed of the weights' slots, not the scores'."""
    balance = _call(module, ops.balance_loss.default)
    _after(balance, aten.mul.Tensor, 2.0)


@pytest.mark.parametrize(
    ("edit", "settings"),
    [
        (wrong_expert_index, EXACT),
        (wrong_expert_index, LOSSY),
        (gate_not_normalised, EXACT),
        (gate_not_normalised, FULL),
        (gradient_detached, EXACT),
        (gradient_detached, LOSSY),
        (hidden_gradient_detached, LOSSY),
        (bias_dropped, EXACT),
        (bias_dropped, LOSSY),
        (combine_weights_ignored, EXACT),
        (router_reads_rows, EXACT),
        (router_reads_rows, LOSSY),
        (up_and_gate_swapped, LOSSY),
        (dropped_rows_kept, FULL),
        (split_scale_missing, SPLIT),
        (balance_before_bias, EXACT),
    ],
)
def test_mistake_in_an_expert_layer(
    edit: Edit, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _edit_layers(monkeypatch, edit)
    _caught(settings, "lift_experts")


# mistakes in the weights


def _mutate_origin(monkeypatch: pytest.MonkeyPatch, name: str, mutated: Callable[..., Any]) -> None:
    original = getattr(Origin, name)
    monkeypatch.setattr(Origin, name, lambda self, value: mutated(original, self, value))


def test_experts_that_share_one_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_only(deal: Callable[..., Tensor], origin: Origin, dense: Tensor) -> Tensor:
        pieces = deal(origin, dense)
        return pieces[:1].expand_as(pieces).clone()

    _mutate_origin(monkeypatch, "deal", first_only)
    assert "restore their source" in str(_caught(SPLIT, "lift_experts"))


def test_hidden_units_dealt_out_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up and down no longer agree on which units an expert has."""

    def rolled(deal: Callable[..., Tensor], origin: Origin, dense: Tensor) -> Tensor:
        pieces = deal(origin, dense)
        return pieces.roll(1, 0) if origin.dim == 1 else pieces

    _mutate_origin(monkeypatch, "deal", rolled)
    _caught(SPLIT, "lift_experts")


@pytest.mark.parametrize("settings", [EXACT, SPLIT])
def test_wrong_transposition(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A square matrix that the user stored as [in, out] is taken as [out, in]: shapes do not tell."""
    square = DecoderRecipe(d_model=12, num_layers=1, ffn=FeedForwardRecipe(hidden=12, spelling="matmul"))
    matrix = build_experts._matrix
    monkeypatch.setattr(build_experts, "_matrix", lambda node: (matrix(node)[0], False))
    with pytest.raises(VerifyError, match="pass lift_experts"):
        moec.compile(square.build(), {"moe": settings}, verify="full")


def test_a_weight_that_changed_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    make = build_experts.ExpertInit.make
    monkeypatch.setattr(build_experts.ExpertInit, "make", lambda *args: make(*args) * (1 + 1e-6))
    assert "restore their source" in str(_caught(EXACT, "lift_experts"))


def test_a_router_as_narrow_as_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cast to fp32 is lost: nothing in fp64 can show it."""

    def narrow(module: fx.GraphModule) -> None:
        router = _call(module, ops.router.default)
        router.target = aten.linear.default
        weight = module.get_parameter("router.weight")
        weight.data = weight.data.bfloat16()

    _edit_layers(monkeypatch, narrow)
    assert "precision" in str(_caught(EXACT, "lift_experts", torch.bfloat16))


# mistakes in the program around the layers


@pytest.mark.parametrize("settings", [EXACT, LOSSY])
def test_the_feed_forward_of_another_layer(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    build = lift_experts.build_experts

    def of_the_other(program: Program, name: str, *rest: Any) -> ExpertLayer:
        layer = build(program, name[:-1] + str(1 - int(name[-1])), *rest)
        layer.name, layer.index = f"moe_{name[-1]}", int(name[-1])
        return layer

    monkeypatch.setattr(lift_experts, "build_experts", of_the_other)
    _caught({**settings, "layers": "0", "residual": "none"}, "lift_experts")


@pytest.mark.parametrize("settings", [EXACT, LOSSY])
def test_a_layer_that_reads_the_wrong_value(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input of the norm before it, in place of its output."""
    replace = lift_experts._replace_call

    def misread(program: Program, call: fx.Node, layer: ExpertLayer) -> None:
        x = call.args[0]
        assert isinstance(x, fx.Node)
        call.args = (x.args[0],)
        replace(program, call, layer)

    monkeypatch.setattr(lift_experts, "_replace_call", misread)
    _caught(settings, "lift_experts")


@pytest.mark.parametrize("settings", [EXACT, LOSSY])
def test_a_residual_added_twice(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    branch = branch_experts._branch

    def twice(program: Program, name: str, *rest: Any) -> None:
        branch(program, name, *rest)
        named = {node.name: node for node in program.graph.graph.nodes}
        mixed, dense = named[name.replace("ffn", "y")], named[name.replace("ffn", "f")]
        _after(mixed, aten.add.Tensor, dense).meta = dict(mixed.meta)

    monkeypatch.setattr(branch_experts, "_branch", twice)
    _caught(settings, "branch_experts")


def test_shares_of_the_mix_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    region = branch_experts._mix_region

    def swapped(*args: Any) -> fx.GraphModule:
        module = region(*args)
        first, second = _calls(module, aten.slice.Tensor)
        first.args, second.args = second.args, first.args
        module.recompile()
        return module

    monkeypatch.setattr(branch_experts, "_mix_region", swapped)
    assert "two branches by hand" in str(_caught(EXACT, "branch_experts"))


def test_experts_grown_from_the_dense_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch is left as it was and the feed-forward beside it becomes the experts: the mix is the
    wrong way."""
    replace = lift_experts._replace_call

    def other(program: Program, call: fx.Node, layer: ExpertLayer) -> None:
        dense = next(
            n for n in program.graph.graph.nodes if n.target == str(call.target).replace("branch", "ffn")
        )
        replace(program, dense, layer)

    monkeypatch.setattr(lift_experts, "_replace_call", other)
    _caught({**EXACT, "layers": "0"}, "lift_experts")


def test_terms_with_the_wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_terms, "_balance_weight", lambda settings: 0.1)
    _caught(EXACT, "collect_terms")


def test_terms_of_one_layer_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    item = collect_terms._item
    first: list[fx.Node] = []

    def same(graph: fx.Graph, call: fx.Node, *rest: Any) -> fx.Node:
        first.append(call)
        return item(graph, first[0], *rest)

    monkeypatch.setattr(collect_terms, "_item", same)
    _caught(EXACT, "collect_terms")


def test_logits_that_lost_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    collect = collect_terms._collect

    def detached(root: fx.GraphModule, calls: list[fx.Node]) -> None:
        collect(root, calls)
        end = output(root.graph)
        logits, terms = end.args[0]  # type: ignore[misc]
        with root.graph.inserting_before(end):
            end.args = ((root.graph.call_function(aten.detach.default, (logits,)), terms),)

    monkeypatch.setattr(collect_terms, "_collect", detached)
    _caught(EXACT, "collect_terms")


# without a mistake


@pytest.mark.parametrize("settings", [EXACT, LOSSY, FULL, SPLIT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_without_a_mistake(settings: dict[str, Any], dtype: torch.dtype) -> None:
    program = _compile(settings, dtype)
    verdicts = {c.rewrite: c.verdict for c in program.certificates}
    assert verdicts["lift_experts"] == ("proved" if settings in (EXACT, SPLIT) else "measured")
    assert all(check.holds for c in program.certificates for check in c.checks)
