"""Times every operator of a program while the program runs: forward one by one, backward between gradients.

Operators are timed where they stand, so that what they find in the caches, how their operands lie and whether
their results take fresh memory is as in any run. Backward goes through operators in reverse; the time between
the gradient of one result and the gradient of the result before it is the operator's own.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

Clock = Callable[[], float]
Times = dict[str, list[float]]
"""Operator by name, as `Operation.name` has it → seconds of each run."""


class WatchedRun(fx.Interpreter):
    """Runs a root graph and the regions in it; `forward` and `backward` gather seconds by operator."""

    def __init__(self, graph: fx.GraphModule, clock: Clock = time.perf_counter) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.clock, self.prefix = clock, ""
        self.forward: Times = defaultdict(list)
        self.backward: Times = defaultdict(list)
        self._marks: list[tuple[str, float]] = []
        self._inner: dict[str, WatchedRun] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A region, watched as the root is, or whatever else a module is."""
        module = self.fetch_attr(str(target))
        if not isinstance(module, fx.GraphModule):
            return super().call_module(target, args, kwargs)
        if target not in self._inner:
            inner = self._inner[str(target)] = WatchedRun(module, self.clock)
            inner.prefix = f"{self.prefix}{target}."
            inner.forward, inner.backward, inner._marks = self.forward, self.backward, self._marks
        return self._inner[str(target)].run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """One node; those that call operators are timed."""
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        begin = self.clock()
        result = n.target(*args, **kwargs)
        self.forward[self.prefix + n.name].append(self.clock() - begin)
        self._mark(self.prefix + n.name, result)
        return result

    def _mark(self, name: str, result: Any) -> None:
        """Note when the gradient of a result arrives."""
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, Tensor) and value.requires_grad and value.grad_fn is not None:
                value.register_hook(lambda _, name=name: self._marks.append((name, self.clock())))

    def run_backward(self, loss: Tensor) -> float:
        """`loss.backward()`; gives the seconds until the first gradient of a result, those of the loss."""
        self._marks.clear()
        begin = self.clock()
        loss.backward()
        end = self.clock()
        for name, seconds in intervals(self._marks, end):
            self.backward[name].append(seconds)
        return (self._marks[0][1] if self._marks else end) - begin


def intervals(marks: Sequence[tuple[str, float]], end: float) -> Iterator[tuple[str, float]]:
    """(operator, seconds) from the moments at which gradients arrived, in order.

    Several results of one operator wait for each other: what passes until the last of them arrived belongs to
    whatever was at work.
    """
    total: dict[str, float] = defaultdict(float)
    following = [*marks[1:], ("", end)]
    for (name, begin), (_, until) in zip(marks, following, strict=True):
        total[name] += until - begin
    yield from total.items()
