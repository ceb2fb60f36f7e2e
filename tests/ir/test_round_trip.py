"""Printing and parsing are inverse: over every operator of the vocabulary, and over whole programs."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._ops import OpOverload

import moec
from moec.capture.capture import capture
from moec.ir import vocabulary
from moec.ir.bind import bind
from moec.ir.kinds import INFIX_SIZES
from moec.ir.overloads import candidates, normal_call
from moec.ir.parse import ParsedProgram, parse_program
from moec.ir.shapes import propagate
from moec.ir.text import program_text
from moec.runtime.weights import weights_of
from moec.testing import NAMED, DecoderRecipe, decoders
from tests.ir.hand_made import model


def calls_of(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Each call as plain data: name, target, arguments in normal form; nodes by name, weights by path.

    A list of which only items are used has no name in the text, so it is known by the names of its items.
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    items = {item: node for node in nodes for item in _items(node)}
    return [_plain_call(node) for node in nodes if node not in items]


def _items(node: fx.Node) -> list[fx.Node]:
    users = list(node.users)
    if not all(user.target is operator.getitem for user in users):
        return []
    return users if len({user.args[1] for user in users}) == len(users) else []


def _plain_call(node: fx.Node) -> tuple[Any, ...]:
    args, kwargs = node.args, node.kwargs
    if isinstance(node.target, OpOverload):
        args, kwargs = normal_call(node.target, args, kwargs)
    name = sorted((item.args[1], item.name) for item in _items(node)) or node.name
    return name, node.target, _plain(args), _plain(kwargs)


def _plain(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return f"self.{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value).__name__, repr(value)


def assert_same_program(before: fx.GraphModule, parsed: ParsedProgram) -> None:
    """Same names, targets, arguments and results, in every region."""
    assert calls_of(parsed.root) == calls_of(before.graph)
    for name in parsed.region_names():
        assert calls_of(parsed.functions[name]) == calls_of(graph_of(before, name))
    returned = [next(reversed(g.nodes)).args[0] for g in (before.graph, parsed.root)]
    assert _plain(returned[0]) == _plain(returned[1])


def graph_of(root: fx.GraphModule, name: str) -> fx.Graph:
    """The graph of a region."""
    region = root.get_submodule(name)
    assert isinstance(region, fx.GraphModule)
    return region.graph


# every operator of the vocabulary, with arguments of the kinds it declares


def operators() -> list[OpOverload]:
    packets = [getattr(torch.ops.aten, name) for name in dir(torch.ops.aten) if not name.startswith("_")]
    packets += [getattr(torch.ops.aten, name) for name in ("__and__", "__or__", "_softmax", "_to_copy")]
    packets += [vocabulary.packet(name) for name in vocabulary.WORDS]
    found = {o for p in packets if isinstance(p, torch._ops.OpOverloadPacket) for o in candidates(p)}
    return sorted((o for o in found if not vocabulary.refusal(o) and _can_be_drawn(o)), key=str)


def _can_be_drawn(overload: OpOverload) -> bool:
    return all(
        argument.has_default_value() or _values(str(argument.real_type), [], [], []) is not None
        for argument in overload._schema.arguments
    )


def _values(kind: str, tensors: list[fx.Node], sizes: list[fx.Node], flags: list[fx.Node]) -> Any:
    """A strategy for arguments declared as `kind`; None when a program cannot hold such a thing."""
    if kind.startswith("Optional["):
        inner = _values(kind[9:-1], tensors, sizes, flags)
        return st.none() if inner is None else st.none() | inner
    if kind.startswith("List["):
        inner = _values(kind[5:-1], tensors, sizes, flags)
        return None if inner is None else st.lists(inner, min_size=1, max_size=3)
    integers = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 5) | st.sampled_from([*sizes, 2])
    scalars = {
        "Tensor": st.sampled_from([*tensors, None]) if not tensors else st.sampled_from(tensors),
        "number": integers | st.floats() | st.booleans(),
        "int": integers,
        "float": st.floats(),
        "bool": st.booleans() | st.sampled_from([*flags, True]),
        "str": st.text(),
        "ScalarType": st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64]),
        "Layout": st.just(torch.strided),
        "MemoryFormat": st.sampled_from([torch.contiguous_format, torch.preserve_format]),
        "Device": st.sampled_from([torch.device("cpu"), torch.device("cuda:1"), torch.device("meta")]),
    }
    return scalars.get(kind)


@st.composite
def graphs(draw: st.DrawFn) -> fx.GraphModule:
    """A graph of a few calls that nobody could run, each well-formed by its operator's declaration."""
    owner = torch.nn.Module()
    owner.register_buffer("table", torch.zeros(2))
    owner.h = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    graph = fx.Graph()
    tokens = graph.placeholder("tokens")
    training = graph.create_node("get_attr", "training", name="training")
    tensors = [tokens, graph.get_attr("table"), graph.get_attr("h.0.weight")]
    sizes = [graph.call_function(torch.ops.aten.sym_size.int, (tokens, 1))]
    for _ in range(draw(st.integers(1, 6))):
        if draw(st.integers(0, 9)) == 0:
            symbols = [t for t in INFIX_SIZES if t.__name__ in ("add", "sub", "mul", "floordiv", "mod")]
            other: Any = draw(st.sampled_from([*sizes, 3, -2]))
            sizes.append(graph.call_function(draw(st.sampled_from(symbols)), (sizes[-1], other)))
        else:
            _draw_call(draw, graph, tensors, sizes, training)
    graph.output((tensors[-1], sizes[-1]))
    return fx.GraphModule(owner, graph)


OPERATORS = operators()


def _draw_call(
    draw: st.DrawFn, graph: fx.Graph, tensors: list[fx.Node], sizes: list[fx.Node], training: fx.Node
) -> None:
    overload = draw(st.sampled_from(OPERATORS))
    args, kwargs = [], {}
    positional = True
    for declared in overload._schema.arguments:
        strategy = _values(str(declared.real_type), tensors, sizes, [training])
        positional = positional and not declared.kwarg_only
        if strategy is None or (declared.has_default_value() and draw(st.booleans())):
            positional = False
        elif positional:
            args.append(draw(strategy))
        else:
            kwargs[declared.name] = draw(strategy)
    node = graph.call_function(overload, tuple(args), kwargs)
    returns = [str(r.real_type) for r in overload._schema.returns]
    if returns == ["Tensor"]:
        tensors.append(node)
    elif "Tensor" in returns or returns == ["List[Tensor]"]:
        index = returns.index("Tensor") if "Tensor" in returns else draw(st.integers(0, 3))
        tensors.append(graph.call_function(operator.getitem, (node, index)))


@settings(max_examples=400)
@given(graphs())
def test_any_call_is_read_back_as_it_was(graph: fx.GraphModule) -> None:
    text = program_text(graph)
    assert_same_program(graph, parse_program(text))
    compile(text, "program.py", "exec")


def test_the_vocabulary_is_wide() -> None:
    assert len(OPERATORS) > 400


# whole programs


@pytest.mark.parametrize("sparse", [(), (1, 3)])
def test_a_hierarchical_program_round_trips_and_runs(sparse: tuple[int, ...]) -> None:
    before = model(sparse)
    text = program_text(before)
    after = assert_round_trip(before, text)
    assert list(after.state_dict()) == list(before.state_dict())
    assert len(list(after.parameters())) == len(list(before.parameters()))


def assert_round_trip(before: fx.GraphModule, text: str) -> fx.GraphModule:
    """The text parses to the same program, and text, original and rebuilt program give the same bits."""
    parsed = parse_program(text, trusted=True)  # captured programs may still write in place
    assert_same_program(before, parsed)
    after = parsed.assemble(weights_of(before))
    propagate(after)
    defined: dict[str, Any] = {}
    exec(text, defined)
    tokens = torch.randint(0, 7, (2, 5))
    for training in (False, True):
        answers = []
        for run in (before.train(training), after.train(training), bind(defined, before)):
            torch.manual_seed(1)
            answers.append(run(tokens))
        assert_identical(answers[0], answers[1])
        assert_identical(answers[0], answers[2])
    return after


def assert_identical(one: Any, two: Any) -> None:
    """Equal bit for bit, through tuples and dicts."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        assert_identical(list(one.values()), list(two.values()))
    else:
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_identical(first, second)


@pytest.mark.parametrize("family", ["albert_like", "bloom_like", "gpt2_like", "llama_like", "neox_like"])
def test_named_decoders_round_trip(family: str) -> None:
    program = capture(NAMED[family].build(0))
    assert_round_trip(program.graph, program.text())


@settings(max_examples=15)
@given(decoders())
def test_random_decoders_round_trip(recipe: DecoderRecipe) -> None:
    program = capture(recipe.build(0))
    assert_round_trip(program.graph, program.text())


def test_an_item_of_a_list_written_out() -> None:
    graph = fx.Graph()
    tokens = graph.placeholder("tokens")
    pair = [graph.call_function(torch.ops.aten.detach.default, (tokens,)) for _ in range(2)]
    graph.output(graph.call_function(operator.getitem, (pair, 1), name="second"))
    before = fx.GraphModule(torch.nn.Module(), graph)
    assert "second = [detach_default, detach_default_1][1]" in program_text(before)
    assert_same_program(before, parse_program(program_text(before)))


def test_every_stage_of_a_compiled_program_round_trips() -> None:
    program = moec.compile(NAMED["llama_like"].build(0), "residual_moe", verify="off")
    for stage, graph in program.stages.items():
        assert_round_trip(graph, program.text(stage))
