"""Shapes: symbolic, equal to those of real runs, computed once for alike layers, refused with the node."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

import moec
from moec.capture import capture
from moec.errors import VerifyError
from moec.ir.graphs import graph_modules
from moec.ir.shapes import KnownShapes, propagate
from moec.testing import NAMED

aten = torch.ops.aten


class Recorder(fx.Interpreter):
    """Runs a graph and compares every tensor with the shape it was promised."""

    def __init__(self, module: fx.GraphModule, sizes: dict[str, int]) -> None:
        super().__init__(module)
        self.sizes, self.compared = sizes, 0

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        promised = node.meta["val"] if node.op == "call_function" else None
        if isinstance(value, Tensor) and isinstance(promised, Tensor):
            shape = [eval(str(size).replace("//", "//"), {}, self.sizes) for size in promised.shape]
            assert list(value.shape) == shape, node
            assert value.dtype == promised.dtype, node
            self.compared += 1
        return value

    def call_module(self, target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        inner = Recorder(self.module.get_submodule(str(target)), self.sizes)
        result = inner.run(*args)
        self.compared += inner.compared
        return result


@pytest.mark.parametrize("name", ["nano_gpt", "llama_like", "bloom_like", "phi3_like", "shared_ffn"])
@pytest.mark.parametrize("stage", ["captured", "canonical", "structured"])
def test_shapes_are_those_of_a_run(name: str, stage: str) -> None:
    program = moec.compile(NAMED[name].build(), verify="off")
    graph = program.stages[stage].eval()
    tokens = next(node for node in graph.graph.nodes if node.op == "placeholder")
    for shape in ((2, 9), (1, 1), (5, 4)):
        sizes = {str(symbol): size for symbol, size in zip(tokens.meta["val"].shape, shape, strict=True)}
        recorder = Recorder(graph, sizes)
        recorder.run(NAMED[name].tokens(batch=shape[0], length=shape[1]))
        assert recorder.compared > 20


def test_layers_that_are_alike_are_computed_once() -> None:
    program = capture(NAMED["nano_gpt"].build(device="meta"))
    known = program.graph.graph.find_nodes(op="placeholder")[0].meta["shapes"]
    assert isinstance(known, KnownShapes)
    linears = [node for node in program.graph.graph.nodes if node.target is aten.linear.default]
    assert len({id(node.meta["val"]) for node in linears}) < len(linears)


def test_forks_share_what_is_known_and_stay_right() -> None:
    program = capture(NAMED["nano_gpt"].build())
    fork = program.fork()
    gelu = next(node for node in fork.graph.graph.nodes if node.target is aten.gelu.default)
    with fork.graph.graph.inserting_after(gelu):
        wider = fork.graph.graph.call_function(aten.to.dtype, (gelu, torch.float64))
    propagate(fork.graph)
    assert wider.meta["val"].dtype is torch.float64
    assert gelu.meta["val"].dtype is torch.float32


def test_numbers_that_are_equal_and_not_the_same_are_kept_apart() -> None:
    graph = fx.Graph()
    x = graph.placeholder("tokens")
    made = [graph.call_function(aten.full.default, ([2], value)) for value in (1, 1.0, True)]
    graph.output((x, *made))
    module = fx.GraphModule(torch.nn.Module(), graph)
    propagate(module)
    assert [node.meta["val"].dtype for node in made] == [torch.int64, torch.float32, torch.bool]


def test_what_does_not_fit_is_named() -> None:
    program = capture(NAMED["nano_gpt"].build())
    linear = next(node for node in program.graph.graph.nodes if node.target is aten.linear.default)
    linear.args = (linear.args[0], linear.args[0])
    with pytest.raises(VerifyError, match=f"(?s){linear.name} = aten.linear.*shapes and dtypes that fit"):
        propagate(program.graph)


def test_every_region_has_shapes() -> None:
    program = moec.compile(NAMED["llama_like"].build(), verify="off")
    for _, module in graph_modules(program.graph):
        assert all("val" in node.meta for node in module.graph.nodes if node.op == "call_function")
