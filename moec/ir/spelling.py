"""How one node is written: `linear(x, self.up.weight)`, `x * 0.5`, `qkv[..., :64]`, `tokens.shape[1]`.

Every short spelling is used only where `moec.ir.parse` reads it back as the same call; anything else falls
back to the plain `name(arguments)` or `name.overload(arguments)`. Text that comes from a user's model (names,
strings) is escaped here and nowhere else.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from .kinds import INFIX_SIZES, NUMBERS
from .overloads import Kind, is_default, kind_of, normal_call, resolve
from .vocabulary import SIZE_FUNCTIONS, packet, word_of

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floor_divide": "//", "remainder": "%", "pow": "**",
    "matmul": "@", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "__and__": "&",
    "__or__": "|", "__xor__": "^", "__lshift__": "<<", "__rshift__": ">>",
}  # fmt: skip
PREFIX = {"neg": "-", "bitwise_not": "~"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_ATOM = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")
_INDEX = re.compile(r"(0|[1-9][0-9]*)\Z")


def printable(text: str) -> str:
    """`text` with every character escaped that could end a comment or turn the reader's eye around."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def attribute_path(target: str) -> str:
    """`h.3.ln.weight` → `self.h[3].ln.weight`; odd names become `self["odd name"]`."""
    return "self" + "".join(_atom(atom) for atom in target.split("."))


def _atom(atom: str) -> str:
    if _ATOM.match(atom) and not keyword.iskeyword(atom):
        return f".{atom}"
    return f"[{atom}]" if _INDEX.match(atom) else f"[{atom!a}]"


def local_name(name: str, words: set[str]) -> str:
    """The variable of a node: its name, with `_` appended where that would hide a word of the text."""
    if not _NAME.match(name):
        raise ValueError(f"{name!r} cannot be the name of a variable")
    hides = name in words or keyword.iskeyword(name) or name == "self" or name.endswith("_")
    return f"{name}_" if hides else name


class Spelling:
    """Writes the expressions of one graph. `words` collects the words used; variables avoid `taken`."""

    def __init__(self, kinds: Mapping[fx.Node, Kind], taken: set[str]) -> None:
        self.kinds, self.taken = kinds, taken
        self.words: set[str] = set()

    # values

    def name(self, node: fx.Node) -> str:
        """The variable that holds `node`; weights are written where they are used."""
        return (
            attribute_path(str(node.target)) if node.op == "get_attr" else local_name(node.name, self.taken)
        )

    def value(self, value: Any) -> str:
        """An argument: a variable, a weight, a constant, or a list, tuple or dict of such."""
        if isinstance(value, fx.Node):
            return self.name(value)
        if isinstance(value, tuple):
            return f"({', '.join(map(self.value, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(map(self.value, value))}]"
        if isinstance(value, dict):
            items = (f"{_key(key)}: {self.value(item)}" for key, item in value.items())
            return "{" + ", ".join(items) + "}"
        return self._constant(value)

    def returned(self, value: Any) -> str:
        """What stands after `return`: several values need no brackets."""
        written = self.value(value)
        return written[1:-1] if isinstance(value, tuple) and len(value) > 1 else written

    def _constant(self, value: Any) -> str:
        if isinstance(value, torch.device):
            return f'"{value}"'
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return self._word(str(value).removeprefix("torch."))
        if isinstance(value, float) and value != value:
            return self._word("nan")
        if isinstance(value, float) and abs(value) == float("inf"):
            return ("-" if value < 0 else "") + self._word("inf")
        if isinstance(value, str):
            return _quoted(value)
        if value is None or isinstance(value, bool | int | float | complex):
            return repr(value)
        raise ValueError(f"a {type(value).__name__} cannot stand in a program: {value!r:.60}")

    def _word(self, word: str) -> str:
        self.words.add(word.partition(".")[0])
        return word

    # calls

    def expression(self, node: fx.Node) -> str:
        """What stands on the right of `name = …`."""
        if node.op == "call_method":
            return f"{self.value(node.args[0])}.{node.target}({', '.join(map(self.value, node.args[1:]))})"
        if node.op == "call_module" and node.kwargs:
            raise ValueError(f"{node.name}: a region is called with positional arguments only")
        if node.op == "call_module":
            return f"{attribute_path(str(node.target))}({', '.join(map(self.value, node.args))})"
        if isinstance(node.target, OpOverload):
            return self._call(node.target, *normal_call(node.target, node.args, node.kwargs))
        if node.target is operator.getitem and type(node.args[1]) is int:
            return f"{self.value(node.args[0])}[{node.args[1]}]"
        return self._on_sizes(node)

    def _on_sizes(self, node: fx.Node) -> str:
        symbol = INFIX_SIZES.get(node.target)
        if symbol and any(isinstance(arg, fx.Node) for arg in node.args):
            return self._infix(symbol, node.args[0], node.args[1])
        if node.target is operator.neg:
            return f"-{self.value(node.args[0])}"
        arguments = ", ".join(map(self.value, node.args))
        known = next((name for name, function in SIZE_FUNCTIONS.items() if function is node.target), None)
        return f"{self._word(known)}({arguments})" if known else f"{_foreign(node.target)}({arguments})"

    def _infix(self, symbol: str, left: Any, right: Any) -> str:
        first = self.value(left)
        if symbol == "**" and first.startswith("-"):
            first = f"({first})"
        return f"{first} {symbol} {self.value(right)}"

    def _call(self, overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        short = None if kwargs else self._short(overload, args)
        if short is not None:
            return short
        word = word_of(overload)
        leading, named = _arranged(overload, args, kwargs)
        kinds = {name: kind_of(value, self.kinds) for name, value in named.items()}
        found = packet(word)
        resolved = found and resolve(found, [kind_of(arg, self.kinds) for arg in leading], kinds)
        called = self._word(word if resolved is overload else f"{word}.{overload._overloadname}")
        written = [
            *map(self.value, leading),
            *(f"{name}={self.value(value)}" for name, value in named.items()),
        ]
        return f"{called}({', '.join(written)})"

    # short spellings, each the inverse of one rule of the parser

    def _short(self, overload: OpOverload, args: tuple[Any, ...]) -> str | None:
        if overload.namespace != "aten" or not args:
            return None
        if overload is torch.ops.aten.sym_size.int and self._is_variable(args[0]) and type(args[1]) is int:
            return f"{self.value(args[0])}.shape[{args[1]}]"
        if overload in (torch.ops.aten.slice.Tensor, torch.ops.aten.select.int, torch.ops.aten.index.Tensor):
            return self._subscript(overload, args) if self._is_tensor(args[0]) else None
        if len(args) == 2:
            return self._infix_tensor(overload, *args)
        if len(args) == 1 and overload._opname in PREFIX and overload._overloadname == "default":
            return f"{PREFIX[overload._opname]}{self.value(args[0])}" if self._is_tensor(args[0]) else None
        return None

    def _is_tensor(self, value: Any) -> bool:
        return kind_of(value, self.kinds) == "tensor"

    def _is_variable(self, value: Any) -> bool:
        return self._is_tensor(value) and value.op != "get_attr"

    def _infix_tensor(self, overload: OpOverload, left: Any, right: Any) -> str | None:
        kinds = [kind_of(left, self.kinds), kind_of(right, self.kinds)]
        if any(kind != "tensor" and kind not in NUMBERS for kind in kinds) or "tensor" not in kinds:
            return None
        if overload is torch.ops.aten.rsub.Scalar:
            return self._infix("-", right, left)
        symbol = INFIX.get(overload._opname)
        if symbol is None or (kinds[0] != "tensor" and symbol != "**"):
            return None
        means = resolve(overload.overloadpacket, kinds, {})
        return self._infix(symbol, left, right) if means is overload else None

    def _subscript(self, overload: OpOverload, args: tuple[Any, ...]) -> str | None:
        base = self.value(args[0])
        if overload is torch.ops.aten.index.Tensor:
            return f"{base}[{', '.join(map(self.value, args[1]))}]" if self._are_indices(args[1]) else None
        dim = args[1] if len(args) > 1 else 0
        selects = overload is torch.ops.aten.select.int
        if type(dim) is not int or not -4 <= dim <= 3 or (selects and not self._is_variable(args[0])):
            return None  # `self.table[0]` is the weight called "0" of `table`
        entry = self.value(args[2]) if selects else self._slice(*args[2:])
        if dim >= 0:
            return f"{base}[{', '.join([':'] * dim + [entry])}]"
        return f"{base}[{', '.join(['...', entry] + [':'] * (-1 - dim))}]"

    def _slice(self, start: Any = None, end: Any = None, step: Any = 1) -> str:
        ends = ["" if end is None else self.value(end) for end in (start, end)]
        return ":".join(ends if step == 1 and type(step) is int else [*ends, self.value(step)])

    def _are_indices(self, indices: Any) -> bool:
        """Whether `x[i, j]` means index.Tensor: tensors of at least one dim (others are read as selects)."""
        values = [index.meta.get("val") if isinstance(index, fx.Node) else None for index in indices]
        return bool(values) and all(isinstance(v, torch.Tensor) and v.dim() > 0 for v in values)


def _arranged(
    overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """What is written by position (required arguments, leading tensors) and what by name (options)."""
    if any(keyword.iskeyword(declared.name) for declared in overload._schema.arguments):
        return list(args), kwargs
    leading: list[Any] = []
    named: dict[str, Any] = {}
    by_name = False
    for declared, value in zip(overload._schema.arguments, args, strict=False):
        by_name = by_name or is_default(declared, value) or _is_option(overload, declared)
        if not by_name:
            leading.append(value)
        elif not is_default(declared, value):
            named[declared.name] = value
    return leading, named | kwargs


def _is_option(overload: OpOverload, declared: Any) -> bool:
    if "Tensor" in str(declared.real_type):
        return False
    return bool(declared.has_default_value()) or overload.namespace != "aten"


def _key(key: str | int) -> str:
    """A key of a dict: a name, or the number of a layer."""
    return repr(key) if type(key) is int else _quoted(str(key))


def _quoted(text: str) -> str:
    """A string literal in plain ASCII, in double quotes where that needs no escape."""
    literal = ascii(text)
    return (
        f'"{literal[1:-1]}"'
        if literal.startswith("'") and '"' not in literal and "\\" not in literal
        else literal
    )


def _foreign(target: Any) -> str:
    """A function from outside the vocabulary, by its full name (readable; the parser will refuse it)."""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", "unknown")
    return re.sub(r"[^A-Za-z0-9_.]", "_", f"{getattr(target, '__module__', '')}.{name}".lstrip("."))
