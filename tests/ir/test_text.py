"""How programs look, and what a diff of two of them says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from moec.errors import PassError
from moec.ir import Origins, Program, Source
from moec.ir.diff import diff_text, functions_of
from moec.ir.graphs import root_module
from moec.ir.layout import ranges
from moec.ir.text import program_text
from moec.testing import assert_golden
from tests.ir.hand_made import model

GOLDEN = Path(__file__).parents[1] / "golden"
aten = torch.ops.aten


@pytest.mark.golden
def test_a_dense_program() -> None:
    assert_golden(program_text(model(), "hand made · structured"), GOLDEN / "text_structured.txt")


@pytest.mark.golden
def test_a_sparse_program() -> None:
    assert_golden(program_text(model((1, 3)), "hand made · sparse"), GOLDEN / "text_sparse.txt")


@pytest.mark.golden
def test_a_diff_of_two_stages() -> None:
    before, after = program_text(model(layers=12)), program_text(model(tuple(range(1, 12, 2)), layers=12))
    assert_golden(diff_text(before, after, "structured", "sparse"), GOLDEN / "text_diff.txt")


# single lines

PLAIN = [
    ((aten.add.Tensor, "x", "y"), "x + y"),
    ((aten.add.Tensor, "x", "y", {"alpha": 2}), "add(x, y, alpha=2)"),
    ((aten.add.Tensor, "x", 1), "x + 1"),
    ((aten.add.Scalar, "x", 1), "add.Scalar(x, 1)"),
    ((aten.rsub.Scalar, "x", 1.0), "1.0 - x"),
    ((aten.mul.Tensor, "x", -0.5), "x * -0.5"),
    ((aten.pow.Tensor_Scalar, "x", 2), "x ** 2"),
    ((aten.pow.Scalar, -2, "x"), "(-2) ** x"),
    ((aten.eq.Scalar, "x", 0), "x == 0"),
    ((aten.__and__.Tensor, "x", "y"), "x & y"),
    ((aten.bitwise_and.Tensor, "x", "y"), "bitwise_and(x, y)"),
    ((aten.matmul.default, "x", "y"), "x @ y"),
    ((aten.neg.default, "x"), "-x"),
    ((aten.slice.Tensor, "x", 0, 0, 2**63 - 1), "x[:]"),
    ((aten.slice.Tensor, "x", 1, 2, 5, 2), "x[:, 2:5:2]"),
    ((aten.slice.Tensor, "x", -1, None, 4), "x[..., :4]"),
    ((aten.slice.Tensor, "x", -2, 4), "x[..., 4:, :]"),
    ((aten.slice.Tensor, "x", 7, 4), "slice(x, dim=7, start=4)"),
    ((aten.select.int, "x", 1, -1), "x[:, -1]"),
    ((aten.select.int, "w", 0, 0), "select(self.w, 0, 0)"),
    ((aten.slice.Tensor, "w", 0, 3), "self.w[3:]"),
    ((aten.sym_size.int, "x", -1), "x.shape[-1]"),
    ((aten.softmax.int, "x", -1), "softmax(x, -1)"),
    ((aten.softmax.int, "x", -1, torch.float32), "softmax(x, -1, dtype=float32)"),
    ((aten.to.dtype, "x", torch.bfloat16), "to(x, bfloat16)"),
    ((aten.arange.default, 3, {"device": torch.device("cuda", 1)}), 'arange(3, device="cuda:1")'),
    ((aten.where.ScalarOther, "x", "y", float("-inf")), "where(x, y, -inf)"),
    ((aten.dropout.default, "x", 0.1, "training"), "dropout(x, 0.1, self.training)"),
    ((aten.gelu.default, "x", {"approximate": "none"}), "gelu(x)"),
    ((aten.linear.default, "x", "w", None), "linear(x, self.w)"),
    ((aten.sum.dim_IntList, "x", [-1], True), "sum(x, [-1], keepdim=True)"),
    ((aten.expand.default, "x", [2, -1]), "expand(x, [2, -1])"),
]


@pytest.mark.parametrize(("call", "written"), PLAIN)
def test_how_a_call_is_written(call: tuple[Any, ...], written: str) -> None:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {name: graph.placeholder(name) for name in ("x", "y")}
    owner = root_module()
    owner.register_buffer("w", torch.ones(2))
    nodes |= {"w": graph.get_attr("w"), "training": graph.create_node("get_attr", "training")}
    target, *args = call
    kwargs = args.pop() if isinstance(args[-1], dict) else {}
    given = tuple(nodes.get(a, a) if isinstance(a, str) else a for a in args)
    graph.output(graph.create_node("call_function", target, given, kwargs, name="out"))
    assert f"    out = {written}\n" in program_text(fx.GraphModule(owner, graph))


def test_what_no_text_can_say_is_an_error() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.add.Tensor, (x, torch.ones(1))))
    with pytest.raises(ValueError, match="Tensor cannot stand in a program"):
        program_text(fx.GraphModule(root_module(), graph))


@pytest.mark.parametrize(
    ("numbers", "written"),
    [
        ([0, 1, 2, 3], "0–3"),
        ([1, 3, 5, 7], "1, 3 … 7"),
        ([1, 3, 5], "1, 3, 5"),
        ([0, 1], "0, 1"),
        ([2], "2"),
        ([], ""),
    ],
)
def test_ranges_of_layers(numbers: list[int], written: str) -> None:
    assert ranges(numbers) == written


# diffs


def test_equal_programs_have_no_diff() -> None:
    text = program_text(model((1,)))
    assert diff_text(text, text.replace("# [B, S", "# [B, T")) == ""


def test_one_odd_layer_is_the_only_thing_said() -> None:
    diff = diff_text(program_text(model()), program_text(model(odd=2)))
    assert "# changed: ffn_2\n" in diff
    assert diff.count("@@") == 1
    assert '+     h_1 = gelu(h, approximate="tanh")' in diff


def test_a_layer_that_became_another_is_compared_with_it() -> None:
    diff = diff_text(program_text(model()), program_text(model((1, 3))))
    assert "# became: ffn → moe 1, 3 (×2)" in diff
    assert "@@ ffn_1 → moe_1   ×2 alike: 1, 3" in diff
    assert "@@ block_1   ×2 alike: 1, 3" in diff
    assert "ffn_3 →" not in diff


def test_both_directions_add_up() -> None:
    old, new = program_text(model()), program_text(model((1, 3)))
    forth, back = diff_text(old, new), diff_text(new, old)
    assert forth.count("\n+ ") == back.count("\n- ")
    assert forth.count("\n- ") == back.count("\n+ ")


def test_functions_of_a_text() -> None:
    functions = functions_of(program_text(model((1, 3))))
    assert functions["moe_1"] == functions["moe_3"]
    assert [name for name in functions if name.startswith("block")] == [f"block_{i}" for i in range(4)]
    assert functions["head"][-1].startswith("    return logits")


# the program's own face


def test_program_text_and_diff() -> None:
    program = Program(
        model((1, 3)), source=Source("hand made", 11), origins=Origins({}), stage="sparse",
        snapshots={"structured": model(), "sparse": model((1, 3))},
    )  # fmt: skip
    assert str(program).startswith(
        "# hand made · sparse · 1,498 parameters, 954 active\n# 2 × 4 experts, 2 active\n"
    )
    assert program.text("structured").startswith("# hand made · structured\n")
    assert program.diff("structured") == program.diff("structured", "sparse")
    with pytest.raises(PassError, match="'structured'"):
        program.text("structurd")
