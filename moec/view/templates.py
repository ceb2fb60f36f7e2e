"""Lines of code with the names of variables left open, each spelled once, however many layers have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from moec.ir.overloads import Kind
from moec.ir.spelling import Spelling, attribute_path
from moec.view.numbering import templated_code

OPEN = "\0"  # where the name of a variable stands; no code has it, strings are escaped


@dataclass(frozen=True)
class Template:
    """`linear(\\0, self.up.weight)`: code, which variable stands at each opening (by the order in which the
    node first reads them), and the words of the vocabulary in it."""

    code: str
    order: tuple[int, ...]
    words: frozenset[str]

    def filled(self, names: list[str]) -> str:
        """The code with the names of the variables that the node reads."""
        first, *rest = self.code.split(OPEN)
        parts = (names[place] + piece for place, piece in zip(self.order, rest, strict=True))
        return first + "".join(parts)


Known = dict[Any, Template]


class TemplateSpelling(Spelling):
    """Spells one graph like `Spelling`; what it has spelled before is `known`."""

    def __init__(self, kinds: Mapping[fx.Node, Kind], known: Known) -> None:
        super().__init__(kinds, set())
        self.known, self.layer = known, None
        self._read: list[fx.Node] = []

    layer: int | None

    def template(self, node: fx.Node, layer: int | None) -> Template:
        """The right-hand side of the line of `node`, which belongs to `layer`."""
        self.layer = layer
        variables = variables_of(node)
        numbers = {variable: number for number, variable in enumerate(variables)}
        called = self._attribute(str(node.target)) if node.op == "call_module" else node.target
        key = (node.op, called, self._form((node.args, node.kwargs), numbers))
        if key not in self.known:
            self.known[key] = self._spelled(node, numbers)
        return self.known[key]

    def _spelled(self, node: fx.Node, numbers: Mapping[fx.Node, int]) -> Template:
        self._read, self.words = [], set()
        code = f"return {self.returned(node.args[0])}" if node.op == "output" else self.expression(node)
        return Template(code, tuple(numbers[read] for read in self._read), frozenset(self.words))

    def name(self, node: fx.Node) -> str:
        """An opening, or the name of a weight."""
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        self._read.append(node)
        return OPEN

    def expression(self, node: fx.Node) -> str:
        """As of `Spelling`, with the layer left open in the name of a region."""
        if node.op == "call_module" and not node.kwargs:
            return f"{self._attribute(str(node.target))}({', '.join(map(self.value, node.args))})"
        if node.op == "placeholder":
            return ""
        return super().expression(node)

    def _attribute(self, target: str) -> str:
        return templated_code(attribute_path(target), self.layer)

    def _form(self, value: Any, numbers: Mapping[fx.Node, int]) -> Any:
        """What spelling goes by: equal forms are spelled the same."""
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return self._attribute(str(value.target)), self._facts(value)
            return numbers[value], self._facts(value)
        if isinstance(value, list | tuple):
            return type(value).__name__, tuple(self._form(item, numbers) for item in value)
        if isinstance(value, dict):
            return "dict", tuple((repr(key), self._form(item, numbers)) for key, item in value.items())
        return type(value), repr(value)

    def _facts(self, node: fx.Node) -> tuple[Any, ...]:
        value = node.meta.get("val")
        return node.op, self.kinds.get(node), value.dim() if isinstance(value, Tensor) else None


def variables_of(node: fx.Node) -> list[fx.Node]:
    """What `node` reads by name, each once, in the order of its arguments."""
    return [other for other in node.all_input_nodes if other.op != "get_attr"]
