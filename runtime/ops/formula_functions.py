"""The words a formula may use: what each computes, what it is short for, and its derivative.

`spelled` and `pullbacks` are formulas in the same language, so nothing here is said twice: a kernel generator
needs the primitives alone, and takes every other word apart. In them `a` and `b` are the arguments, `y` is
the result, and `g` is what arrives from behind. A word that ends in `_backward` exists for derivatives; its
arguments are `g` and then `a` (or `y`), and no formula may use it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

LARGEST_POWER = 8


@dataclass(frozen=True)
class Function:
    """One word. `numbers`: how many of the last arguments must be plain numbers.

    `spelled`: the same in simpler words, empty for a primitive. `pullbacks`: one formula for each argument
    that may be a tensor, empty for words of derivatives.
    """

    name: str
    arguments: int
    compute: Callable[..., Any]
    spelled: str = ""
    pullbacks: tuple[str, ...] = ()
    numbers: int = 0

    @property
    def is_primitive(self) -> bool:
        """Whether a kernel generator must know this word itself."""
        return not self.spelled

    @property
    def is_public(self) -> bool:
        """Whether a formula may use this word."""
        return bool(self.pullbacks)


def _step(value: Tensor) -> Tensor:
    """1 where a value is positive, 0 elsewhere."""
    return (value > 0).to(value.dtype)


def _maximum(left: Any, right: Any) -> Tensor:
    if isinstance(right, Tensor) and isinstance(left, Tensor):
        return torch.maximum(left, right)
    return left.clamp_min(right) if isinstance(left, Tensor) else right.clamp_min(left)


def _minimum(left: Any, right: Any) -> Tensor:
    if isinstance(right, Tensor) and isinstance(left, Tensor):
        return torch.minimum(left, right)
    return left.clamp_max(right) if isinstance(left, Tensor) else right.clamp_max(left)


_LARGER = "(step(a - b) + 0.5 * (1 - step(a - b) - step(b - a)))"  # of two equal ones, each has one half
_INNER_TANH = "tanh(0.7978845608028654 * (a + 0.044715 * a * a * a))"
_SOFTPLUS = "(maximum(a, 0) + log(1 + exp(-abs(a))))"

_TABLE = (
    # primitives
    Function("neg", 1, operator.neg, "", ("-g",)),
    Function("add", 2, operator.add, "", ("g", "g")),
    Function("sub", 2, operator.sub, "", ("g", "-g")),
    Function("mul", 2, operator.mul, "", ("g * b", "g * a")),
    Function("div", 2, operator.truediv, "", ("g / b", "-(g * y / b)")),
    Function("exp", 1, torch.exp, "", ("g * y",)),
    Function("log", 1, torch.log, "", ("g / a",)),
    Function("sqrt", 1, torch.sqrt, "", ("g / (2 * y)",)),
    Function("tanh", 1, torch.tanh, "", ("tanh_backward(g, y)",)),
    Function("erf", 1, torch.erf, "", ("g * (1.1283791670955126 * exp(-(a * a)))",)),
    Function("sigmoid", 1, torch.sigmoid, "", ("sigmoid_backward(g, y)",)),
    Function("abs", 1, torch.abs, "", ("g * (step(a) - step(-a))",)),
    Function("step", 1, _step),  # for derivatives: its own is zero
    Function("maximum", 2, _maximum, "", (f"g * {_LARGER}", f"g * (1 - {_LARGER})")),
    Function("minimum", 2, _minimum, "", (f"g * (1 - {_LARGER})", f"g * {_LARGER}")),
    # composed of them
    Function("rsqrt", 1, torch.rsqrt, "1 / sqrt(a)", ("-0.5 * g * y * y * y",)),
    Function("reciprocal", 1, torch.reciprocal, "1 / a", ("-(g * y * y)",)),
    Function("pow", 2, torch.pow, "power", ("power",), numbers=1),  # by repeated products, see `power`
    Function("clamp_min", 2, torch.clamp_min, "maximum(a, b)", ("g * (1 - step(b - a))",), numbers=1),
    Function("clamp_max", 2, torch.clamp_max, "minimum(a, b)", ("g * (1 - step(a - b))",), numbers=1),
    Function("relu", 1, torch.relu, "maximum(a, 0)", ("relu_backward(g, a)",)),
    Function("relu6", 1, aten.relu6, "minimum(maximum(a, 0), 6)", ("g * step(a) * step(6 - a)",)),
    Function(
        "leaky_relu", 2, torch.nn.functional.leaky_relu, "maximum(a, 0) + b * minimum(a, 0)",
        ("g * (step(a) + b * (1 - step(a)))",), numbers=1,
    ),
    Function(
        "elu", 1, aten.elu, "maximum(a, 0) + (exp(minimum(a, 0)) - 1)",
        ("g * (step(a) + (1 - step(a)) * exp(minimum(a, 0)))",),
    ),
    Function("silu", 1, aten.silu, "a * sigmoid(a)", ("silu_backward(g, a)",)),
    Function("gelu", 1, aten.gelu, "0.5 * a * (1 + erf(0.7071067811865476 * a))", ("gelu_backward(g, a)",)),
    Function(
        "gelu_tanh", 1, lambda a: aten.gelu(a, approximate="tanh"), f"0.5 * a * (1 + {_INNER_TANH})",
        ("gelu_tanh_backward(g, a)",),
    ),
    Function("softplus", 1, aten.softplus, _SOFTPLUS, ("softplus_backward(g, a)",)),
    Function("mish", 1, aten.mish, f"a * tanh({_SOFTPLUS})", ("mish_backward(g, a)",)),
    Function(
        "hardsigmoid", 1, aten.hardsigmoid, "minimum(maximum(a + 3, 0), 6) / 6",
        ("hardsigmoid_backward(g, a)",),
    ),
    Function(
        "hardswish", 1, aten.hardswish, "a * minimum(maximum(a + 3, 0), 6) / 6", ("hardswish_backward(g, a)",)
    ),
    # derivatives
    Function("tanh_backward", 2, aten.tanh_backward, "g * (1 - a * a)"),
    Function("sigmoid_backward", 2, aten.sigmoid_backward, "g * (a * (1 - a))"),
    Function("relu_backward", 2, lambda g, a: aten.threshold_backward(g, a, 0), "g * step(a)"),
    Function(
        "silu_backward", 2, aten.silu_backward, "g * (sigmoid(a) * (1 + a * (1 - sigmoid(a))))"
    ),
    Function(
        "gelu_backward", 2, aten.gelu_backward,
        "g * (0.5 * (1 + erf(0.7071067811865476 * a)) + a * (0.3989422804014327 * exp(-0.5 * a * a)))",
    ),
    Function(
        "gelu_tanh_backward", 2, lambda g, a: aten.gelu_backward(g, a, approximate="tanh"),
        f"g * (0.5 * (1 + {_INNER_TANH}) + 0.5 * a * (1 - {_INNER_TANH} * {_INNER_TANH})"
        " * (0.7978845608028654 * (1 + 0.134145 * a * a)))",
    ),
    Function("softplus_backward", 2, lambda g, a: aten.softplus_backward(g, a, 1, 20), "g * sigmoid(a)"),
    Function(
        "mish_backward", 2, aten.mish_backward,
        f"g * (tanh({_SOFTPLUS}) + a * sigmoid(a) * (1 - tanh({_SOFTPLUS}) * tanh({_SOFTPLUS})))",
    ),
    Function("hardsigmoid_backward", 2, aten.hardsigmoid_backward, "g * step(a + 3) * step(3 - a) / 6"),
    Function(
        "hardswish_backward", 2, aten.hardswish_backward,
        "g * ((1 - step(-3 - a)) * (1 - step(a - 3)) * (a / 3 + 0.5) + step(a - 3))",
    ),
)  # fmt: skip

FUNCTIONS = {function.name: function for function in _TABLE}
PRIMITIVES = tuple(function.name for function in _TABLE if function.is_primitive)
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}  # words that a formula writes as signs
WORDS = tuple(f.name for f in _TABLE if f.is_public and f.name not in (*OPERATORS, "neg"))


def names_in(function: Function) -> tuple[str, ...]:
    """What the arguments of `function` are called where it is spelled."""
    return ("g", "a") if function.name.endswith("_backward") else ("a", "b")[: function.arguments]


def power(exponent: int) -> tuple[str, str]:
    """How `pow(a, exponent)` is spelled, and its pullback, as products."""
    lower = " * ".join(["a"] * (exponent - 1))
    return f"a * {lower}", f"{exponent} * g * ({lower})"
