"""Every value two graphs compute on the same tokens, and which of them say the same.

Passes rename, merge and move nodes, so names do not tell which value became which. Values do: in fp64 an
honest rewrite reproduces what it keeps to the last few bits. A value that is gone matters only when nothing
that is computed from it came back either; that separates a fused-away intermediate from the place where two
programs part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir.compare import error_of

SAME = 1e-11
NOISE = 1e-12


@dataclass(frozen=True)
class Value:
    """One tensor of one run.

    `site`: the region it stands in, `root` outside of any; `source` and `path`: the user's line and module;
    `inputs`: the numbers of the values it was computed from.
    """

    number: int
    site: str
    name: str
    operator: str
    source: str
    path: str
    tensor: Tensor
    inputs: frozenset[int]

    def __str__(self) -> str:
        at = f"  # {self.source}" if self.source else ""
        return f"{self.site}: {self.name} = {self.operator}  {_size(self.tensor)}{at}"


def record_values(root: fx.GraphModule, tokens: Tensor) -> list[Value]:
    """The floating-point values of `root` and its regions on tokens i64 [B, S], in the order of computation.

    Evaluation mode, no gradients; `root` should be in fp64 (`moec.ir.retarget.in_dtype`). A value that is a
    view or a copy of another is recorded too.
    """
    values: list[Value] = []
    with torch.no_grad():
        _Run(root.eval(), "root", values).run(tokens)
    return values


class _Run(fx.Interpreter):
    """Interpret one graph, regions in turn, and write every tensor down."""

    def __init__(self, module: fx.GraphModule, site: str, values: list[Value]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.site, self.values = site, values
        self.known: dict[fx.Node, frozenset[int]] = {}

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            return self._run_region(node)
        result = super().run_node(node)
        reached = frozenset().union(*(self.known.get(source, frozenset()) for source in node.all_input_nodes))
        if node.op == "call_function":
            self.known[node] = self._put(node, result, reached)
        else:
            self.known.setdefault(node, reached)  # an input of a region is known already
        return result

    def _put(self, node: fx.Node, result: Any, reached: frozenset[int]) -> frozenset[int]:
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return reached
        source, path = (str(node.meta.get(key) or "") for key in ("source", "path"))
        made = Value(len(self.values), self.site, node.name, _operator(node), source, path, result, reached)
        self.values.append(made)
        return frozenset([made.number])

    def _run_region(self, node: fx.Node) -> Any:
        module = self.module.get_submodule(str(node.target))
        assert isinstance(module, fx.GraphModule)
        args, _ = self.fetch_args_kwargs_from_env(node)
        inner = _Run(module, str(node.target), self.values)
        slots = [n for n in module.graph.nodes if n.op == "placeholder"]
        for slot, given in zip(slots, node.args, strict=True):
            inner.known[slot] = (
                self.known.get(given, frozenset()) if isinstance(given, fx.Node) else frozenset()
            )
        result = inner.run(*args)
        last = next(n for n in reversed(module.graph.nodes) if n.op == "output")
        self.known[node] = frozenset().union(*(inner.known.get(n, frozenset()) for n in last.all_input_nodes))
        return result


def _operator(node: fx.Node) -> str:
    """`aten.linear`, `getitem`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))


def _size(tensor: Tensor) -> str:
    return str(list(tensor.shape))


# matching


def is_informative(tensor: Tensor) -> bool:
    """Whether a value says anything: zeros, a mask of infinities and single numbers are equal by chance."""
    if tensor.numel() < 2:
        return False
    finite = tensor[tensor.isfinite()]
    return not finite.numel() or float(finite.max() - finite.min()) > NOISE


class Index:
    """The values of one run, found again by what they say."""

    def __init__(self, values: Iterable[Value]) -> None:
        self._by_size: dict[int, list[Value]] = {}
        for value in values:
            self._by_size.setdefault(value.tensor.numel(), []).append(value)

    def twin(self, value: Value) -> Value | None:
        """A value that says the same, dimensions split or merged aside; None without one."""
        flat = value.tensor.reshape(-1)
        for other in self._by_size.get(value.tensor.numel(), ()):
            if error_of(other.tensor.reshape(-1), flat) <= SAME:
                return other
        return None


def parted(values: Sequence[Value], others: Index) -> list[Value]:
    """The values of one run that the other run lacks, and from which nothing was computed that it has.

    In program order: the first one is where the two runs part.
    """
    back: set[int] = set()
    for value in reversed(values):
        if value.number in back or (is_informative(value.tensor) and others.twin(value) is not None):
            back.add(value.number)
            back.update(value.inputs)
    return [value for value in values if value.number not in back and is_informative(value.tensor)]
