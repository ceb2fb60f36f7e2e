"""The operators inside `torch.compile` without graph breaks, on meta tensors, and with symbolic tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import moec.runtime.ops  # noqa: F401
from moec.testing.same_function import assert_same_function

ops = torch.ops.moec
TOP_K, EXPERTS = 2, 5


def layer(x: Tensor, router: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores = F.linear(ops.jitter(x, 0.1, False).float(), router)
    weights, experts = ops.route(scores, None, TOP_K, "straight-through", "none", True)
    order, counts = ops.assign(experts, EXPERTS, 1.0, 0.0, 1, False, True)
    hidden = F.gelu(ops.grouped_linear(ops.dispatch(x, order, TOP_K), up, bias, counts))
    y = ops.combine(ops.grouped_linear(hidden, down, None, counts), weights, order, counts)
    return y, ops.balance_loss(scores, experts) + ops.z_loss(scores), counts


def inputs(tokens: int, device: str = "cpu") -> list[Tensor]:
    shapes = [(tokens, 8), (EXPERTS, 8), (EXPERTS, 16, 8), (EXPERTS, 16), (EXPERTS, 8, 16)]
    return [torch.randn(*shape, device=device) for shape in shapes]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_forward_and_backward(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert_same_function(layer, compiled, inputs(13))


def test_one_graph_serves_every_number_of_tokens() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
    for tokens in (13, 29, 7):
        y, *_ = compiled(*inputs(tokens))
        assert y.shape == (tokens, 8)
    assert len(graphs) == 1


def test_autocast_inside_a_compiled_function() -> None:
    torch._dynamo.reset()

    def mixed(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(*tensors)

    y, *_ = torch.compile(mixed, fullgraph=True, backend="aot_eager")(*inputs(13))
    assert y.dtype == torch.bfloat16


def test_meta_tensors_go_through_forward_and_backward() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs(13, "meta")]
    y, loss, counts = layer(*leaves)
    (y.sum() + loss).backward()
    assert counts.shape == (EXPERTS,)
    assert [leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves] == [True] * 5


def test_shapes_stay_expressions_of_the_number_of_tokens() -> None:
    graph = make_fx(layer, tracing_mode="symbolic")(*inputs(13)).graph
    shapes = {node.target: node.meta["val"] for node in graph.nodes if node.op == "call_function"}
    rows, y = shapes[ops.dispatch.default], shapes[ops.combine.default]
    order, counts = shapes[ops.assign.default]
    for tensor in (rows, order):
        assert isinstance(tensor.shape[0], torch.SymInt)
        assert tensor.shape[0].node.expr == 2 * y.shape[0].node.expr
    assert not any(free_unbacked_symbols(tensor) for tensor in (order, counts, rows, y))
    assert counts.shape == (EXPERTS,)
