"""Run a program's text on real weights, with a breakpoint wherever you like.

    import program                      # the saved program.py, or an edited copy
    run = bind(vars(program), moec.load("saved").graph)
    logits = run(tokens)

This executes the text, so it is for texts you trust; `moec.ir.parse` reads one without running it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

from .text import function_name

Functions: TypeAlias = Mapping[str, Callable[..., Any]]


class Weights:
    """The `self` of a printed function: reads `self.h[3].ln.weight`, calls `self.ffn_3(x)`."""

    __slots__ = ("_functions", "_module", "_path")

    def __init__(
        self, module: nn.Module, functions: Mapping[str, Callable[..., Any]], path: str = ""
    ) -> None:
        self._module, self._functions, self._path = module, functions, path

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __getitem__(self, key: str | int) -> Any:
        value = getattr(self._module, str(key))
        below = f"{self._path}.{key}" if self._path else str(key)
        return Weights(value, self._functions, below) if isinstance(value, nn.Module) else value

    def __call__(self, *args: Any) -> Any:
        return self._functions[function_name(self._path)](self, *args)


def bind(functions: Functions, module: nn.Module) -> Callable[..., Any]:
    """`tokens [B, S] → logits` (with terms, once the program has them): the text's `forward` on `module`.

    `functions`: the names that executing the text defined. `module`: anything with the weights the text
    reads, such as `program.graph`; it is read, not copied, so training state and weights stay its own.
    """
    return Weights(module, functions)
