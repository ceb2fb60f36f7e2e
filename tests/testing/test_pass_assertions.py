"""`assert_preserves` and `assert_refuses` against passes that are right, and passes wrong in one way each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

from moec.capture import capture
from moec.errors import PassError
from moec.ir import Check, Origin, Pass, Program
from moec.testing import NAMED, assert_preserves, assert_refuses

ATEN = torch.ops.aten


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(NAMED["nano_gpt"].build(1, torch.float64))


def _wrap(program: Program, target: object, wrapper: Callable[[fx.Graph, fx.Node], fx.Node]) -> Program:
    """Put what `wrapper` makes behind the first node that calls `target`."""
    graph = program.graph.graph
    node = next(n for n in graph.nodes if n.target == target)
    with graph.inserting_after(node):
        new = wrapper(graph, node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    program.graph.recompile()
    return program


def _call(function: object, *extra: object) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    return lambda graph, node: graph.call_function(function, (node, *extra))  # type: ignore[arg-type]


@dataclass(frozen=True)
class DoubleNegate(Pass):
    """gelu(x) → -(-gelu(x))."""

    def apply(self, program: Program) -> Program:
        return _wrap(
            _wrap(program, ATEN.gelu.default, _call(ATEN.neg.default)),
            ATEN.neg.default,
            _call(ATEN.neg.default),
        )


@dataclass(frozen=True)
class Scale(Pass):
    """gelu(x) → gelu(x) · factor; not the same function unless factor is 1."""

    contract: ClassVar[str] = "exact"
    factor: float = 1.0

    def apply(self, program: Program) -> Program:
        return _wrap(program, ATEN.gelu.default, _call(ATEN.mul.Tensor, self.factor))


class DeclaredApproximate(Scale):
    contract: ClassVar[str] = "approximate"


class Detach(Scale):
    def apply(self, program: Program) -> Program:
        return _wrap(program, ATEN.gelu.default, _call(ATEN.detach.default))


class WriteWeights(Scale):
    def apply(self, program: Program) -> Program:
        with torch.no_grad():
            next(program.graph.parameters()).mul_(2.0)
        return program


class KeepState(Scale):
    """Remembers being called: the second application differs."""

    seen: ClassVar[list[int]] = []

    def apply(self, program: Program) -> Program:
        self.seen.append(1)
        return (
            _wrap(program, ATEN.gelu.default, _call(ATEN.mul.Tensor, 1.0)) if len(self.seen) % 2 else program
        )


class AddOrphan(Scale):
    def apply(self, program: Program) -> Program:
        program.graph.register_parameter("orphan", nn.Parameter(torch.zeros(2)))
        return program


class FailEnsures(Scale):
    def ensures(self, before: Program, after: Program) -> list[Check]:
        return [Check("the answer", 1.0, 1e-10)]


class ForgetOrigin(Scale):
    """Says that a parameter is new when it is the user's own: its gradient is lost on the way back."""

    def apply(self, program: Program) -> Program:
        name = next(name for name, _ in program.graph.named_parameters())
        program.origins = program.origins.with_({name: Origin(None)})
        return program


class Refuse(Scale):
    def requires(self, program: Program) -> None:
        raise PassError("node add_3", "a sum of three", "a sum of two")


def test_a_right_pass_passes_and_returns_the_rewritten_program(program: Program) -> None:
    text = str(program.graph.graph)
    after = assert_preserves(DoubleNegate(), program)
    assert "neg" in str(after.graph.graph)
    assert str(program.graph.graph) == text
    assert after.training == program.training


@pytest.mark.parametrize(
    ("pass_", "told"),
    [
        (Scale(1 + 1e-7), r"^output: error .* allowed 1e-10"),
        (Detach(), r"^gradient of \S*(wte|attn|norm|positions|c_fc)\S*: error"),
        (AddOrphan(), "orphan has no row in program.origins"),
        (FailEnsures(), "ensures: .*the answer"),
        (KeepState(), "two applications differ"),
        (ForgetOrigin(), "no gradient of"),
    ],
)
def test_a_wrong_pass_is_caught_and_told_apart(program: Program, pass_: Pass, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        assert_preserves(pass_, program)


def test_writing_into_the_given_program_is_caught() -> None:
    own = capture(NAMED["nano_gpt"].build(1, torch.float64))
    with pytest.raises(AssertionError, match="which belongs to the program it was given"):
        assert_preserves(WriteWeights(), own, shapes=())


def test_a_pass_that_is_not_exact_needs_a_tolerance(program: Program) -> None:
    with pytest.raises(ValueError, match="declared 'approximate' here"):
        assert_preserves(DeclaredApproximate(1 + 1e-7), program)
    assert_preserves(DeclaredApproximate(1 + 1e-7), program, tolerance=1e-5)


def test_a_refusal_is_matched_and_its_absence_reported(program: Program) -> None:
    assert assert_refuses(Refuse(), program, match="add_3").found == "a sum of three"
    with pytest.raises(AssertionError, match="refused, but not with 'mul_7'"):
        assert_refuses(Refuse(), program, match="mul_7")
    with pytest.raises(AssertionError, match="took a program it should refuse"):
        assert_refuses(DoubleNegate(), program, match="add_3")
