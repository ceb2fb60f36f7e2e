"""From a formula to the Triton functions that kernels call on the results of their products.

    f(v0, v1, v2)       -> the formula's result; leaves beyond the formula's own are ignored
    df(v0, v1, v2, g)   -> gradients of v0, v1, v2 for g at the result, and the result again

Their text is written from the formula's schedules, one line a step, and given to `triton.jit` like a function
in a file: `linecache` holds it, so error messages and `inspect` show it. What the text is made of is this
file's alone (numbers, and the words of a fixed table): nothing of the formula's own text is ever run.
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from moec.errors import OperatorError
from moec.runtime.ops.formula import Formula
from moec.runtime.ops.formula_schedule import Operand, Schedule, Step
from moec.runtime.ops.formula_tree import Leaf

MOST_LEAVES = 3
WORDS = {
    "neg": "-{0}",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "tanh": "2.0 * tl.sigmoid(2.0 * {0}) - 1.0",
    "erf": "tl.erf({0})",
    "sigmoid": "tl.sigmoid({0})",
    "abs": "tl.abs({0})",
    "step": "tl.where({0} > 0.0, 1.0, 0.0)",
    "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})",
}


@dataclass(frozen=True)
class Pointwise:
    """A formula for kernels: its leaves, and its two Triton functions."""

    formula: Formula
    forward: Any
    backward: Any

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The slices of the up products that are read, in the order of the functions' arguments."""
        return self.formula.leaves


def refusal(formula: Formula) -> str:
    """Why the kernels cannot compute `formula`; '' when they can."""
    leaves = len(formula.leaves)
    if leaves > MOST_LEAVES:
        return f"{leaves} different up products are read, and the kernels keep {MOST_LEAVES} at once"
    return ""


@lru_cache(maxsize=256)
def pointwise(formula: Formula) -> Pointwise:
    """The Triton functions of `formula`, made once. Raises `OperatorError` where `refusal` gives a reason."""
    reason = refusal(formula)
    if reason:
        raise OperatorError(f"formula '{formula}' in Triton", reason, f"at most {MOST_LEAVES}")
    forward, backward = source_of(formula)
    return Pointwise(formula, _jit(f"f: {formula}", forward), _jit(f"df: {formula}", backward))


def source_of(formula: Formula) -> tuple[str, str]:
    """The text of `f` and `df`."""
    leaves = len(formula.leaves)
    arguments = [f"v{index}" for index in range(MOST_LEAVES)]
    forward = _function("f", arguments, leaves, 0, formula.forward.spelled())
    backward = formula.backward.spelled()
    spare = (*backward.results[:-1], *[None] * (MOST_LEAVES - leaves), backward.results[-1])
    return forward, _function("df", [*arguments, "g"], leaves, 1, backward, spare)


def _function(
    name: str,
    arguments: Sequence[str],
    leaves: int,
    extra: int,
    schedule: Schedule,
    results: Sequence[Operand | None] | None = None,
) -> str:
    names = [*arguments[:leaves], *arguments[len(arguments) - extra :]]
    lines = ["@triton.jit", f"def {name}({', '.join(arguments)}):"]
    for index, step in enumerate(schedule.steps):
        names.append(f"t{index}")
        lines.append(f"    t{index} = {_call(step, names)}")
    returned = ", ".join(_result(operand, names) for operand in results or schedule.results)
    return "\n".join([*lines, f"    return {returned}", ""])


def _call(step: Step, names: Sequence[str]) -> str:
    return WORDS[step.function].format(*(_operand(operand, names) for operand in step.operands))


def _operand(operand: Operand, names: Sequence[str]) -> str:
    return names[operand] if isinstance(operand, int) else f"({float(operand.value)!r})"


def _result(operand: Operand | None, names: Sequence[str]) -> str:
    """A value; a constant becomes a tensor, as every result must be."""
    if isinstance(operand, int):
        return names[operand]
    return "v0 * 0.0" if operand is None else f"v0 * 0.0 + ({float(operand.value)!r})"


def _jit(title: str, source: str) -> Any:
    where = f"<moec {title}>"
    linecache.cache[where] = (len(source), None, source.splitlines(keepends=True), where)
    namespace: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(source, where, "exec"), namespace)
    return next(value for name, value in namespace.items() if name in ("f", "df"))
