"""Programs made by hand in the form of docs/house.md: text tests need no capture and no passes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

import moec.runtime.ops  # noqa: F401  (registers the operators moec.*)
from moec.ir.graphs import place, root_module
from moec.ir.region import Region
from moec.ir.shapes import propagate

aten = torch.ops.aten
VOCABULARY, WIDTH, HIDDEN, EXPERTS = 11, 6, 10, 4


class Builder:
    """One graph and the module that owns its weights."""

    def __init__(self, **inputs: str) -> None:
        self.owner = fx.GraphModule(root_module(), fx.Graph())
        self.graph = fx.Graph()
        self.meta: dict[str, Any] = {}
        self.inputs = [self.graph.placeholder(name) for name in inputs.values()]

    def weight(self, name: str, *shape: int, value: Tensor | None = None) -> fx.Node:
        """The node that reads `name`, made of random numbers unless a tied `value` is given."""
        if value is None:
            value = nn.Parameter(torch.randn(*shape) * 0.3)
        place(self.owner, name, value)
        return self.graph.get_attr(name)

    def call(self, name: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call node of this name."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta.update(self.meta)
        return node

    def items(self, node: fx.Node, *names: str) -> list[fx.Node]:
        """The values of a list-valued node, one by one."""
        return [self.call(name, operator.getitem, node, index) for index, name in enumerate(names)]

    def region(self, child: fx.GraphModule, *args: Any) -> fx.Node:
        """A call of a region, which becomes a child of the owner."""
        name = child.meta["region"].name
        self.owner.add_module(name, child)
        return self.graph.create_node("call_module", name, args, {}, name=name)

    def done(self, value: Any, region: Region | None = None) -> fx.GraphModule:
        """The finished module."""
        self.graph.output(value)
        self.owner.graph = self.graph
        if region is not None:
            self.owner.meta["region"] = region
        return self.owner


def feed_forward(layer: int, gate: bool = False) -> fx.GraphModule:
    """`ffn_3`: linear, GELU, linear."""
    made = Builder(x="x")
    (x,) = made.inputs
    up, up_bias = made.weight("up.weight", HIDDEN, WIDTH), made.weight("up.bias", HIDDEN)
    h = made.call("h", aten.linear.default, x, up, up_bias)
    h = made.call("h_1", aten.gelu.default, h, approximate="tanh" if gate else "none")
    down, down_bias = made.weight("down.weight", WIDTH, HIDDEN), made.weight("down.bias", WIDTH)
    y = made.call("y", aten.linear.default, h, down, down_bias)
    return made.done(y, Region("ffn", layer, f"transformer.h.{layer}.mlp", "gpt.py:33"))


def experts(layer: int, num_experts: int = EXPERTS) -> fx.GraphModule:
    """`moe_3`: the sparse feed-forward of docs/house.md."""
    made, moe = Builder(x="x"), torch.ops.moec
    (x,) = made.inputs
    router, up, up_bias, down, down_bias = _expert_weights(made, num_experts)
    training = made.graph.create_node("get_attr", "training", name="training")
    tokens = made.call("tokens", aten.flatten.using_ints, x, 0, -2)
    scores = made.call("scores", aten.linear.default, tokens, router)
    route = made.call("route", moe.route.default, scores, None, 2, "normalized", "none", training)
    weights, chosen = made.items(route, "weights", "experts")
    assign = made.call("assign", moe.assign.default, chosen, num_experts, 0.0, 0.0, 4, False, training)
    order, counts = made.items(assign, "order", "counts")
    rows = made.call("rows", moe.dispatch.default, tokens, order, 2)
    h = made.call("h", moe.grouped_linear.default, rows, up, up_bias, counts)
    h = made.call("h_1", aten.gelu.default, h)
    out = made.call("out", moe.grouped_linear.default, h, down, down_bias, counts)
    combined = made.call("combined", moe.combine.default, out, weights, order, counts)
    y = made.call("y", aten.view_as.default, combined, x)
    balance = made.call("balance", moe.balance_loss.default, scores, chosen)
    return made.done((y, balance, counts), _expert_region(layer, num_experts))


def _expert_weights(made: Builder, num_experts: int) -> list[fx.Node]:
    router = made.weight("router.weight", num_experts, WIDTH)
    up = made.weight("up.weight", num_experts, HIDDEN, WIDTH), made.weight("up.bias", num_experts, HIDDEN)
    down = made.weight("down.weight", num_experts, WIDTH, HIDDEN)
    return [router, *up, down, made.weight("down.bias", num_experts, WIDTH)]


def _expert_region(layer: int, num_experts: int) -> Region:
    idle = {"experts": num_experts, "idle_experts": num_experts - 2}
    settings = idle | {"expert_parameters": EXPERT_PARAMETERS}
    return Region("moe", layer, f"transformer.h.{layer}.mlp", "gpt.py:33", {"up": "up.weight"}, settings)


EXPERT_PARAMETERS = ["up.weight", "up.bias", "down.weight", "down.bias"]


def model(sparse: tuple[int, ...] = (), layers: int = 4, odd: int = -1) -> fx.GraphModule:
    """A program of `layers` feed-forwards; `sparse` ones are expert layers, `odd` has another activation."""
    made = Builder(tokens="tokens")
    (tokens,) = made.inputs
    table = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
    made.meta = {"path": "transformer.wte", "source": "gpt.py:50"}
    x = made.call("x", aten.embedding.default, made.weight("transformer.wte.weight", value=table), tokens)
    terms: dict[str, Any] = {}
    for layer in range(layers):
        made.meta = {"path": f"transformer.h.{layer}.ln", "source": "gpt.py:41"}
        norm = made.weight(f"transformer.h.{layer}.ln.weight", WIDTH)
        h = made.call("h" if not layer else f"h_{layer}", aten.layer_norm.default, x, [WIDTH], norm)
        y = _feed_forward_or_experts(made, layer, h, layer in sparse, layer == odd, terms)
        x = made.call(f"x_{layer + 1}", aten.add.Tensor, x, y)
    made.meta = {"path": "transformer.ln_f", "source": "gpt.py:60"}
    logits = made.call("logits", aten.linear.default, x, made.graph.get_attr("transformer.wte.weight"))
    root = made.done((logits, _collected(made, terms)) if terms else logits)
    propagate(root)
    return root


def _collected(made: Builder, terms: dict[str, Any]) -> dict[str, Any]:
    stacked = made.call("stacked", aten.stack.default, [balance for balance, _ in terms.values()])
    total = made.call("total", aten.sum.default, stacked)
    return {"balance": total, "counts": {name: counts for name, (_, counts) in terms.items()}}


def _feed_forward_or_experts(
    made: Builder, layer: int, h: fx.Node, sparse: bool, odd: bool, terms: dict[str, Any]
) -> fx.Node:
    made.meta = {"path": f"transformer.h.{layer}", "source": "gpt.py:42"}
    if not sparse:
        return made.region(feed_forward(layer, odd), h)
    called = made.region(experts(layer), h)
    y, balance, counts = made.items(called, *(f"{name}_{layer}" for name in ("y", "balance", "counts")))
    terms[f"moe_{layer}"] = (balance, counts)
    return y
