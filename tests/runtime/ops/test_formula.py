"""The formula language: what it accepts and refuses, what it computes, its derivatives, its printing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moec.errors import OperatorError
from moec.runtime.ops.formula import Formula, read_formula
from moec.runtime.ops.formula_functions import FUNCTIONS, LARGEST_POWER, PRIMITIVES, WORDS

aten = torch.ops.aten

# What each word means, in torch's own words.
MEANINGS: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "tanh": torch.tanh,
    "erf": torch.erf, "sigmoid": torch.sigmoid, "abs": torch.abs, "maximum": torch.maximum,
    "minimum": torch.minimum, "reciprocal": torch.reciprocal, "pow": torch.pow,
    "clamp_min": lambda a, n: a.clamp(min=n), "clamp_max": lambda a, n: a.clamp(max=n), "relu": F.relu,
    "relu6": F.relu6, "leaky_relu": F.leaky_relu, "elu": F.elu, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"), "softplus": F.softplus, "mish": F.mish,
    "hardsigmoid": F.hardsigmoid, "hardswish": F.hardswish,
}  # fmt: skip


def one_word(word: str) -> str:
    function = FUNCTIONS[word]
    if function.numbers:
        return f"lambda a: {word}(a, {3 if word == 'pow' else 0.5})"
    names = ", ".join("ab"[: function.arguments])
    return f"lambda {names}: {word}({names})"


def tensors_for(formula: Formula, width: int = 12) -> list[Tensor]:
    """Numbers of both signs, zero and large ones; positive where a logarithm or root is taken."""
    made = [3 * torch.randn(7, width, dtype=torch.float64) for _ in formula.parameters]
    made[0][0, :3] = torch.tensor([0.0, 30.0, -30.0])
    positive = any(f"{word}(" in str(formula) for word in ("log", "sqrt", "reciprocal"))
    return [tensor.abs() + 0.1 if positive else tensor for tensor in made]


def spelled(formula: Formula, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients and result from primitives alone."""
    by_name = dict(zip(formula.parameters, tensors, strict=True))
    leaves = [leaf.of(by_name[leaf.name]) for leaf in formula.leaves]
    *gradients, result = formula.backward.spelled().run([*leaves, grad])
    return [*formula.assemble(by_name, gradients), result]


def assert_derivatives(text: str, needed: Callable[..., Tensor], tolerance: float = 1e-12) -> None:
    formula = read_formula(text)
    tensors = [tensor.requires_grad_() for tensor in tensors_for(formula)]
    result = needed(*tensors)
    grad = torch.randn_like(result)
    wanted = [*torch.autograd.grad(result, tensors, grad), result]
    with torch.no_grad():
        gradients, found = formula.pull_back(tensors, grad)
        for a, b, c in zip([*gradients, found], spelled(formula, tensors, grad), wanted, strict=True):
            torch.testing.assert_close(a, c, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(b, c, rtol=1e-7, atol=1e-7)  # softplus is linear above 20
        torch.testing.assert_close(formula.apply(tensors), result, rtol=tolerance, atol=tolerance)


def test_every_word_has_a_meaning() -> None:
    assert set(WORDS) == set(MEANINGS)


@pytest.mark.parametrize("word", WORDS)
def test_words(word: str) -> None:
    numbers = {"pow": (3,)}.get(word, (0.5,)) if FUNCTIONS[word].numbers else ()
    assert_derivatives(one_word(word), lambda *tensors: MEANINGS[word](*tensors, *numbers))


@pytest.mark.parametrize("exponent", range(2, LARGEST_POWER + 1))
def test_powers(exponent: int) -> None:
    assert_derivatives(f"lambda h: pow(h, {exponent})", lambda h: h**exponent, 1e-9)


@pytest.mark.parametrize("word", WORDS)
def test_kernels_need_primitives_alone(word: str) -> None:
    formula = read_formula(one_word(word))
    for schedule in (formula.forward, formula.backward):
        assert {step.function for step in schedule.spelled().steps} <= set(PRIMITIVES)


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("lambda gate, up: silu(gate) * up", lambda gate, up: F.silu(gate) * up),
        ("lambda h: gelu(h[..., :6]) * h[..., 6:]", lambda h: F.gelu(h[..., :6]) * h[..., 6:]),
        ("lambda h: h[..., ::2] / (1 + exp(-h[..., 1::2]))", lambda h: h[..., ::2] * h[..., 1::2].sigmoid()),
        ("lambda h: (h * h)[..., 2:8][..., ::3]", lambda h: (h * h)[..., 2:8:3]),
        ("lambda a, b, c: -(a - (b - c)) / (1.0 + c * c)", lambda a, b, c: -(a - (b - c)) / (1 + c * c)),
        ("lambda a, b: 2 - a - -b * 3 / 4", lambda a, b: 2 - a + b * 3 / 4),
        ("lambda h: h[..., :4] * h[..., 2:6]", lambda h: h[..., :4] * h[..., 2:6]),
        ("lambda h: h", lambda h: h),
        ("lambda a, b: tanh(a) * tanh(a) + 0 * b", lambda a, b: torch.tanh(a) ** 2 + 0 * b),
    ],
)
def test_formulas(text: str, function: Callable[..., Tensor]) -> None:
    assert_derivatives(text, function)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("lambda a,b:(a+b)+a", "lambda a, b: a + b + a"),
        ("lambda a,b: a-(b-a)", "lambda a, b: a - (b - a)"),
        ("lambda a, b: (a*b)/(a*b)", "lambda a, b: a * b / (a * b)"),
        ("lambda a: -(a+1)*-2", "lambda a: -(a + 1) * -2"),
        ("lambda a: a - -2.5", "lambda a: a - -2.5"),
        ("lambda a: a * (2 * 3 - 1)", "lambda a: a * 5"),
        ("lambda h: silu(h)[..., 1:9:2] * h[..., :4]", "lambda h: silu(h[..., 1:9:2]) * h[..., :4]"),
        ("  lambda h: pow(relu(h), 2)", "lambda h: pow(relu(h), 2)"),
    ],
)
def test_prints(text: str, printed: str) -> None:
    assert str(read_formula(text)) == printed
    assert str(read_formula(printed)) == printed


BODIES = st.recursive(
    st.sampled_from(["a", "b", "a[..., :8]", "b[..., 2:][..., :9]"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, st.sampled_from("+-*/"), st.sampled_from(["2", "-1.5"])).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        st.tuples(st.sampled_from(["silu", "tanh", "-", "gelu", "2 - "]), inner).map(
            lambda t: f"{t[0]}({t[1]})"
        ),
    ),
    max_leaves=6,
)


@given(BODIES)
def test_reads_what_it_prints(body: str) -> None:
    formula = read_formula(f"lambda a, b: a + b + {body}")
    again = read_formula(str(formula))
    assert again == formula
    assert again.backward == formula.backward


def test_nothing_is_computed_twice() -> None:
    formula = read_formula("lambda a: sigmoid(a) * sigmoid(a) + a * sigmoid(a)")
    names = [step.function for step in formula.forward.steps]
    assert names.count("sigmoid") == 1
    assert formula.backward.keep([0]).results[0] == len(formula.backward.keep([0]).steps) + 1
    assert len(formula.backward.keep([1]).steps) == len(formula.forward.steps)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h", "one lambda"), ("lambda: 1", "plain parameters"), ("lambda h=1: h", "plain parameters"),
        ("lambda *h: h", "plain parameters"), ("lambda h: gelo(h)", "nearest 'gelu'"),
        ("lambda gate: gte", "nearest 'gate'"), ("lambda h: h.x", "Attribute"),
        ("lambda h: h ** 2", "h \\*\\* 2"),
        ("lambda h: h[0]", "a slice of the last dim"), ("lambda h: h[..., -1:]", "counted from the left"),
        ("lambda h: h[..., ::0]", "a step of at least 1"), ("lambda h, u: h", "not read: u"),
        ("lambda h: pow(h, 0.5)", "whole number"), ("lambda h: pow(h, h)", "a number"),
        ("lambda h: __import__('os')", "Constant"), ("lambda h: silu(h, h)", "2 arguments of silu"),
        ("lambda h: exp(1.0) * h", "exp of numbers alone"), ("lambda h: h +", "invalid syntax"),
        ("lambda h: h if h else 1", "IfExp"), ("lambda h: silu_backward(h, h)", "the word silu_backward"),
        ("lambda h: True * h", "Constant"), ("lambda silu: silu", "a name that means nothing else"),
        ("lambda h: h * 1e999", "Constant"), ("lambda h: h / (1 - 1) * (2 / 0)", "division by zero"),
        ("lambda h: silu(x=h)", "Call"), ("lambda h: (lambda: h)()", "Call"), ("lambda grad: grad", "a name"),
    ],
)  # fmt: skip
def test_refuses(text: str, says: str) -> None:
    with pytest.raises(OperatorError, match=says):
        read_formula(text)


def test_widths() -> None:
    formula = read_formula("lambda h, u: h[..., 1:9:2] * u")
    assert formula.width([9, 4]) == formula.width([8, 4]) == 4
    with pytest.raises(OperatorError, match="8 or more"):
        formula.width([7, 4])
    with pytest.raises(OperatorError, match="parts of one width"):
        formula.width([9, 3])
