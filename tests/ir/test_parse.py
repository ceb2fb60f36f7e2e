"""The parser takes programs and nothing else: hostile and broken texts are refused, with their line."""

from __future__ import annotations

import contextlib
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from moec.errors import ArtifactError
from moec.ir.bind import bind
from moec.ir.graphs import root_module
from moec.ir.parse import parse_program
from moec.ir.spelling import attribute_path, printable
from moec.ir.text import program_text

aten = torch.ops.aten
HEAD = "from moec.ir.vocabulary import add, add_, cat, from_file, gelu, linear, softmax, split, to, view\n"


def body(*lines: str, head: str = HEAD) -> str:
    """A program whose forward holds `lines`."""
    inside = "\n".join(f"    {line}" for line in lines)
    return f"{head}\ndef forward(self, tokens):\n{inside}\n"


HOSTILE = [
    "import os",
    "from os import system",
    "from moec.ir.vocabulary import *",
    "from moec.ir.vocabulary import gelu as eval",
    "from moec.ir.vocabulary import __builtins__",
    "from .vocabulary import gelu",
    "print(1)",
    "x = 1",
    "class forward: pass",
    "async def forward(self, tokens):\n    return tokens",
    "@staticmethod\ndef f(self):\n    return self",
    "def f(self, x=print(1)):\n    return x",
    "def f(self, *x):\n    return x",
    "def f(self, **x):\n    return x",
    "def f(self, x: print(1)):\n    return x",
    "def f(self) -> print(1):\n    return self",
    "def f(x):\n    return x",
    "for x in y: pass",
    "if True: pass",
    "lambda: 1",
    "exec('1')",
    '"""a docstring"""',
    "forward = forward",
]


@pytest.mark.parametrize("statement", HOSTILE)
def test_no_other_statement_is_taken(statement: str) -> None:
    text = f"{HEAD}{statement}\n\ndef forward(self, tokens):\n    return tokens\n"
    with pytest.raises(ArtifactError, match=r"program\.py:\d+"):
        parse_program(text)


REFUSED = [
    "x = __import__('os')",
    "x = eval('1')",
    "x = open('f')",
    "x = tokens.__class__",
    "x = tokens.detach()",
    "x = self.__class__.__mro__[0]",
    "x = self._functions",
    "x = self.h.__dict__",
    'x = self["__class__"]',
    'x = self["a\\"b"]',
    'x = self["a\\\\b"]',
    'x = self["a.b"]',
    'x = self["a\\nb"]',
    'x = self["class"]',
    "x = self[-1]",
    "x = self[True]",
    "x = self[1.5]",
    "x = self[tokens]",
    "x = self.ffn_9(tokens)",
    "x = self(tokens)",
    "x = from_file('/etc/passwd', True, 10)",
    "x = add_(tokens, 1)",
    "x = relu(tokens)",
    "x = gelu.__call__(tokens)",
    "x = gelu.default.redispatch(tokens)",
    "x = gelu(*tokens)",
    "x = gelu(**tokens)",
    "x = gelu(tokens, approximate=print(1))",
    "x = gelu(tokens, no_such_option=1)",
    "x = gelu(b'1')",
    "x = gelu(1)",
    "x = gelu()",
    "x = view(tokens, 'a')",
    "x = (lambda: tokens)()",
    "x = [t for t in tokens]",
    "x = tokens if tokens else tokens",
    "x = f'{tokens}'",
    "x = tokens and tokens",
    "x = 1 < tokens < 2",
    "x = not tokens",
    "x = (y := tokens)",
    "x = await tokens",
    "x = 2 + 2",
    "x = 3",
    "x = 'text'",
    "x = unknown",
    "x = tokens[0, 1]",
    "x = tokens[0:1, 0:1]",
    "x = tokens['a']",
    "x = tokens.shape",
    "x = tokens.shape[tokens]",
    "x, y = tokens",
    "x, *y = split(tokens, 1)",
    "x, self = split(tokens, 1)",
    "x, (y, z) = split(tokens, 1)",
    "x: int = gelu(tokens)",
    "x += tokens",
    "x = y = gelu(tokens)",
    "self.x = gelu(tokens)",
    "self = gelu(tokens)",
    "tokens[0] = gelu(tokens)",
    "gelu(tokens)",
    "del tokens",
    "global tokens",
    "raise tokens",
    "return tokens",
    "import os",
    "pass",
]


@pytest.mark.parametrize("line", REFUSED)
def test_no_other_expression_is_taken(line: str) -> None:
    with pytest.raises(ArtifactError, match=r"program\.py:\d+") as error:
        parse_program(body(line, "return tokens"))
    assert error.value.found
    assert error.value.needed


@pytest.mark.parametrize(
    "ending",
    [
        "x = gelu(tokens)",
        "return",
        "return {1: tokens}",
        "return {'a b': tokens, **tokens}",
        "return {'a\"': 1}",
    ],
)
def test_the_end_is_a_plain_return(ending: str) -> None:
    with pytest.raises(ArtifactError):
        parse_program(body("x = gelu(tokens)", ending))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def forward(self, tokens:",
        "\0",
        "def f(self):\n    return 1\n",
        "(" * 3000,
        "x = " + "-" * 9000 + "1",
    ],
)
def test_texts_that_are_no_programs(text: str) -> None:
    with pytest.raises(ArtifactError):
        parse_program(text)


def test_deep_nesting_is_refused_not_crashed_on() -> None:
    deep = "gelu(" * 300 + "tokens" + ")" * 300
    parsed_or_refused(body(f"x = {deep}", "return x"))
    parsed_or_refused(body("x = " + "-" * 4000 + "tokens", "return x"))
    parsed_or_refused(body("x = self" + ".a" * 4000, "return x"))


def parsed_or_refused(text: str) -> None:
    """Reading either gives a program or an ArtifactError, and never anything else."""
    with contextlib.suppress(ArtifactError):
        parse_program(text)


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    parsed_or_refused(text)


@given(st.data())
def test_any_garbled_program_is_parsed_or_refused(data: st.DataObject) -> None:
    text = body(
        "x = gelu(tokens)", "y = self.h[0].weight[..., :3]", "z, _ = split(x, [1, 2], dim=-1)", "return z"
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 3))
        text = text[:at] + data.draw(st.text("()[]{}.,:=_'\" \nselfx0-*@", max_size=3)) + text[at + cut :]
    parsed_or_refused(text)


def test_the_error_names_line_and_nearest_word() -> None:
    with pytest.raises(ArtifactError) as error:
        parse_program(body("x = gelu(tokens)", "y = gelo(x)", "return y"), file="mine.py")
    assert error.value.where == "mine.py:5"
    assert "gelo" in error.value.found
    assert error.value.nearest == "'gelu'"


def test_trust_admits_operators_and_no_more_python() -> None:
    parsed = parse_program(body("x = add_(tokens, 1)", "return x"), trusted=True)
    assert [node.target for node in parsed.root.nodes if node.op == "call_function"] == [aten.add_.Tensor]
    for line in ("x = __import__('os')", "x = tokens.detach()", 'x = self["a\\"b"]'):
        with pytest.raises(ArtifactError):
            parse_program(body(line, "return x"), trusted=True)


def test_hand_edits_may_nest_calls_and_reuse_names() -> None:
    text = body("x = gelu(tokens + 1) * 2", "x = -x", "return cat([x, gelu(x)], dim=-1)")
    targets = [n.target for n in parse_program(text).root.nodes if n.op == "call_function"]
    gelu = aten.gelu.default
    assert targets == [aten.add.Tensor, gelu, aten.mul.Tensor, aten.neg.default, gelu, aten.cat.default]


# names of a user's model


ODD_NAMES = [
    "a b", "it's", "naïve", "класс", "class", "None", "_orig_mod", "0", "007", "-1", "h[3]", "a;b", "a#b",
    "x=1", "return tokens", "ﬁ", "\u202egnp",
    "a\tb", "a\nimport os\n", "')+(", '");import os;("', "\\", "{tokens}", "self",
    "tokens", "weight",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_stay_names(name: str) -> None:
    """The text stays one statement a line whatever a module is called, and reads back as that name."""
    graph = fx.Graph()
    tokens = graph.placeholder("tokens")
    owner = nn.Module()
    child = nn.Module()
    child.register_parameter("w", nn.Parameter(torch.ones(3)))
    odd = nn.Module()
    odd.add_module(name, child)
    owner.add_module("odd", odd)
    weight = graph.create_node("get_attr", f"odd.{name}.w", name="weight")
    graph.output(graph.call_function(aten.add.Tensor, (tokens, weight), name="sum_1"))
    root = Printable(owner, graph)
    text = program_text(root)
    assert text.isascii()
    assert len(text.splitlines()) == 3
    defined: dict[str, Any] = {}
    exec(text, defined)
    assert torch.equal(bind(defined, owner)(torch.ones(3)), torch.full((3,), 2.0))
    if any(c in name for c in '"\\\t\n\u202e') or name in ("class", "None"):
        parsed_or_refused(text)  # torch.fx itself could not run such a name
    else:
        assert parse_program(text).weight_names() == [f"odd.{name}.w"]


class Printable(fx.GraphModule):
    """A graph module that is not compiled: torch.fx cannot write some of these names as Python."""

    def __init__(self, owner: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root_module(), fx.Graph())
        self._graph = graph
        self.add_module("odd", owner.get_submodule("odd"))


@given(st.text())
def test_comments_stay_comments(text: str) -> None:
    assert "\n" not in printable(text)
    assert len(f"# {printable(text)}".splitlines()) == 1
    assert all(character.isprintable() for character in printable(text))


@given(st.text().filter(lambda name: "." not in name and name))
def test_paths_are_expressions(name: str) -> None:
    code = compile(attribute_path(f"h.{name}"), "x", "eval")

    class Spy:
        def __init__(self, seen: tuple[str, ...] = ()) -> None:
            self.seen = seen

        def __getattr__(self, key: str) -> Spy:
            return Spy((*self.seen, key))

        def __getitem__(self, key: str | int) -> Spy:
            return Spy((*self.seen, str(key)))

    assert eval(code, {"self": Spy()}).seen == ("h", name)


def test_titles_paths_and_sources_cannot_leave_their_comment() -> None:
    graph = fx.Graph()
    tokens = graph.placeholder("tokens")
    node = graph.call_function(aten.neg.default, (tokens,))
    node.meta |= {"path": "h.3\nimport os", "source": "a.py\r:1\u2028x = 1"}
    graph.output(node)
    root = fx.GraphModule(root_module(), graph)
    text = program_text(root, "title\nimport os", "\u202e evil")
    assert [line for line in text.splitlines() if "import" in line and not line.strip().startswith("#")] == []
    parse_program(text)


# small rules of the text


def test_variables_keep_off_the_words_in_use() -> None:
    graph = fx.Graph()
    tokens = graph.placeholder("tokens")
    first = graph.create_node("call_function", aten.gelu.default, (tokens,), name="gelu")
    second = graph.create_node("call_function", aten.gelu.default, (first,), name="linear")
    third = graph.create_node("call_function", aten.gelu.default, (second,), name="y_")
    graph.output(third)
    text = program_text(fx.GraphModule(root_module(), graph))
    assert "gelu_ = gelu(tokens)" in text
    assert "linear = gelu(gelu_)" in text
    assert "y__ = gelu(linear)" in text
    names = [node.name for node in parse_program(text).root.nodes if node.op == "call_function"]
    assert names == ["gelu", "linear", "y_"]


def test_a_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    parsed = parse_program(body("x = self.h[0].weight + 1", "return x"))
    with pytest.raises(ArtifactError, match=r"h\.0\.weight"):
        parsed.assemble({})


def test_lists_are_unpacked_when_only_items_are_read() -> None:
    graph = fx.Graph()
    tokens = graph.placeholder("tokens")
    parts = graph.create_node("call_function", aten.topk.default, (tokens, 2), name="topk")
    values = graph.create_node("call_function", operator.getitem, (parts, 0), name="values")
    indices = graph.create_node("call_function", operator.getitem, (parts, 1), name="indices")
    graph.output((values, indices))
    text = program_text(fx.GraphModule(root_module(), graph))
    assert "    values, indices = topk(tokens, 2)\n    return values, indices\n" in text
    graph.output_node().args = ((values, parts),)
    text = program_text(fx.GraphModule(root_module(), graph))
    assert "    topk_ = topk(tokens, 2)\n    values = topk_[0]\n    indices = topk_[1]\n" in text
