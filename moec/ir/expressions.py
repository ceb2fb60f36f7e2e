"""From an expression of a program's text back to nodes: the inverse of `moec.ir.spelling`.

Works on Python's syntax tree and runs nothing. What it knows is closed: words of the vocabulary, regions
called as `self.ffn_3(x)`, weights as `self.…`, sizes, constants. Everything else is an `ArtifactError` with
its line.
"""

from __future__ import annotations

import ast
import keyword
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from moec.errors import ArtifactError

from .kinds import INFIX_SIZES, NUMBERS, kind_of_attribute, kind_of_call
from .overloads import Kind, kind_of, normal_call, resolve
from .spelling import INFIX
from .text import function_name, unpacked_name
from .vocabulary import CONSTANTS, NAMESPACES, SIZE_FUNCTIONS, nearest_word, packet, refusal

_SYMBOLS: dict[type, str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.MatMult: "@", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>",
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
}  # fmt: skip
_WORD_OF_SYMBOL = {symbol: word for word, symbol in INFIX.items()}
_SIZE_OF_SYMBOL = {symbol: function for function, symbol in INFIX_SIZES.items()}
_NEEDED = "an operator, a region, a weight, a size or a constant"
# A quote or a backslash here would leave the string literal that torch.fx writes the name into.
_ATOM = re.compile(r"[^.\"\\]+\Z")
_KEY = re.compile(r"[A-Za-z0-9_. ]+\Z")


class Expressions:
    """Builds one function's graph. `returns`: what the regions known so far return, by function name."""

    def __init__(
        self, file: str, imported: set[str], returns: Mapping[str, Kind], reserved: set[str], trusted: bool
    ) -> None:
        self.file, self.imported, self.returns, self.trusted = file, imported, returns, trusted
        self.graph = fx.Graph()
        self.variables: dict[str, fx.Node] = {}
        self.kinds: dict[fx.Node, Kind] = {}
        self.reserved = reserved
        self.written: set[str] = set()
        self._weights: dict[str, fx.Node] = {}

    def refuse(self, at: ast.AST, found: str, needed: str = "", nearest: str = "") -> ArtifactError:
        """The error for the line of `at`, to be raised."""
        where = f"{self.file}:{getattr(at, 'lineno', 1)}"
        return ArtifactError(where, found, needed or _NEEDED, nearest)

    def declare(self, variable: str, node: fx.Node, kind: Kind) -> None:
        """From here on the text's `variable` means `node`."""
        self.variables[variable] = node
        self.kinds[node] = kind
        self.written.add(node.name)

    # values: what may stand as an argument

    def value(self, at: ast.expr) -> Any:
        """A node, a constant, or a list, tuple or dict of such."""
        match at:
            case ast.Name(id=name):
                return self._named(at, name)
            case ast.Constant(value=value) if value is None or isinstance(value, bool | int | float | str):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=operand) if self._is_number(operand):
                return -self.value(operand)
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.Dict(keys=keys, values=values):
                return {self._key(at, key): self.value(item) for key, item in zip(keys, values, strict=True)}
        return self.node(at, None)

    def _named(self, at: ast.expr, name: str) -> Any:
        if name in self.variables:
            return self.variables[name]
        if name in CONSTANTS and name in self.imported:
            return CONSTANTS[name]
        raise self.refuse(
            at, f"the name {name!r}", "a variable set above, or an imported constant", nearest_word(name)
        )

    def _is_number(self, at: ast.expr) -> bool:
        if isinstance(at, ast.Constant):
            return type(at.value) in (int, float)
        return isinstance(at, ast.Name) and at.id in ("inf", "nan") and at.id not in self.variables

    def _key(self, at: ast.expr, key: ast.expr | None) -> str:
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and _KEY.match(key.value):
            return key.value
        raise self.refuse(at, "a key that is no plain name", "keys of letters, digits, '_', '.' and spaces")

    # nodes: what may stand on the right of an assignment

    def node(self, at: ast.expr, name: str | None) -> fx.Node:
        """The node an expression stands for, called `name` (None: a name is made up)."""
        path = self.weight_path(at)
        if path is not None:
            return self._weight(path)
        match at:
            case ast.Call():
                return self._call(at, name)
            case ast.BinOp(left=left, op=op, right=right):
                return self._infix(at, _SYMBOLS[type(op)], left, right, name)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _SYMBOLS:
                return self._infix(at, _SYMBOLS[type(op)], left, right, name)
            case ast.UnaryOp(op=ast.USub() | ast.Invert() as op, operand=operand):
                return self._prefix(at, op, operand, name)
            case ast.Subscript():
                return self._subscript(at, name)
        raise self.refuse(at, _shown(at))

    def weight_path(self, at: ast.expr) -> str | None:
        """`h.3.ln.weight` for `self.h[3].ln.weight`; None when the expression is nothing of `self`."""
        match at:
            case ast.Attribute(value=ast.Name(id="self"), attr=atom):
                return self._atom(at, atom)
            case ast.Subscript(value=ast.Name(id="self"), slice=ast.Constant(value=int() | str() as atom)):
                return self._key_atom(at, atom)
            case ast.Attribute(value=owner, attr=atom) if (path := self.weight_path(owner)) is not None:
                return f"{path}.{self._atom(at, atom)}"
            case ast.Subscript(value=owner, slice=ast.Constant(value=int() | str() as atom)):
                path = self.weight_path(owner)
                return f"{path}.{self._key_atom(at, atom)}" if path is not None else None
        return None

    def _atom(self, at: ast.expr, atom: str) -> str:
        if atom.startswith("_"):
            raise self.refuse(
                at, f"the attribute {atom!r}", 'names without a leading underscore (self["_name"])'
            )
        return atom

    def _key_atom(self, at: ast.expr, atom: int | str) -> str:
        text = str(atom)
        if type(atom) is int and atom >= 0:
            return text
        if isinstance(atom, str) and _ATOM.match(text) and text.isprintable() and not _is_special(text):
            return text
        raise self.refuse(
            at, f"the name {atom!r} of a module or weight", "a plain name without quotes or dots"
        )

    def _weight(self, path: str) -> fx.Node:
        if path not in self._weights:
            base = "self_" + re.sub(r"\W", "_", path, flags=re.ASCII)
            node = self.graph.create_node("get_attr", path, name=self._name(base, None))
            self.kinds[node] = kind_of_attribute(path)
            self._weights[path] = node
        return self._weights[path]

    def create(
        self, at: ast.expr, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str | None
    ) -> fx.Node:
        """A new call node, its arguments in normal form."""
        if isinstance(target, OpOverload):
            reason = "" if self.trusted else refusal(target)
            if reason:
                raise self.refuse(
                    at, reason, "operators of the vocabulary", "trust=True, if you know who wrote this text"
                )
            try:
                args, kwargs = normal_call(target, args, kwargs)
            except TypeError as error:
                raise self.refuse(at, str(error), f"arguments of {target._schema}") from None
        wanted = self._name(_base(target), name)
        node = self.graph.create_node("call_function", target, tuple(args), dict(kwargs), name=wanted)
        self.kinds[node] = kind_of_call(target, args, self.kinds)
        self.written.add(node.name)
        return node

    def _name(self, base: str, name: str | None) -> str:
        """`name`; for '' that of a value the text unpacks; for None one that the text does not use."""
        return name or unpacked_name(base, self.written, self.reserved if name is None else ())

    def _kind(self, value: Any) -> Kind:
        return kind_of(value, self.kinds)

    # calls

    def _call(self, at: ast.Call, name: str | None) -> fx.Node:
        if any(isinstance(arg, ast.Starred) for arg in at.args) or any(k.arg is None for k in at.keywords):
            raise self.refuse(at, "a call with * or **", "arguments written out")
        region = self.weight_path(at.func)
        if region is not None:
            return self._call_region(at, region, name)
        words = self._words(at.func)
        args = [self.value(arg) for arg in at.args]
        kwargs = {str(k.arg): self.value(k.value) for k in at.keywords}
        if words[0] in SIZE_FUNCTIONS and len(words) == 1 and not kwargs:
            return self.create(at, SIZE_FUNCTIONS[words[0]], args, {}, name)
        return self.create(at, self._overload(at, words, args, kwargs), args, kwargs, name)

    def _call_region(self, at: ast.Call, region: str, name: str | None) -> fx.Node:
        returned = self.returns.get(function_name(region))
        if returned is None or at.keywords:
            raise self.refuse(at, f"a call of self.{region}", "a region defined above, positional arguments")
        args = tuple(self.value(arg) for arg in at.args)
        node = self.graph.create_node("call_module", region, args, name=self._name(region, name))
        self.kinds[node] = returned
        self.written.add(node.name)
        return node

    def _words(self, at: ast.expr) -> list[str]:
        """`moec.route.default` as its parts; only names that the text imports."""
        words: list[str] = []
        inner = at
        while isinstance(inner, ast.Attribute):
            words.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in self.imported and inner.id not in self.variables:
            return [inner.id, *words]
        shown = ast.unparse(at)[:60]
        raise self.refuse(at, f"a call of {shown!r}", "an operator imported above", nearest_word(shown))

    def _overload(
        self, at: ast.expr, words: list[str], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> OpOverload:
        length = 2 if words[0] in NAMESPACES else 1
        word, rest = ".".join(words[:length]), words[length:]
        found = packet(word)
        if found is None or len(rest) > 1:
            raise self.refuse(
                at, f"the operator {'.'.join(words)!r}", "an operator of the vocabulary", nearest_word(word)
            )
        if rest and rest[0] in found.overloads():
            return getattr(found, rest[0])
        kinds = {key: self._kind(value) for key, value in kwargs.items()}
        chosen = None if rest else resolve(found, [self._kind(arg) for arg in args], kinds)
        if chosen is None:
            raise self.refuse(
                at, f"{ast.unparse(at)[:80]!r}, which fits no overload", f"one of {found.overloads()}"
            )
        return chosen

    # short spellings

    def _infix(self, at: ast.expr, symbol: str, left: ast.expr, right: ast.expr, name: str | None) -> fx.Node:
        first, second = self.value(left), self.value(right)
        kinds = [self._kind(first), self._kind(second)]
        sizes = all(kind in NUMBERS for kind in kinds)
        if sizes and symbol in _SIZE_OF_SYMBOL and any(isinstance(v, fx.Node) for v in (first, second)):
            return self.create(at, _SIZE_OF_SYMBOL[symbol], [first, second], {}, name)
        if symbol == "-" and kinds[0] in NUMBERS and kinds[1] == "tensor":
            return self.create(at, torch.ops.aten.rsub.Scalar, [second, first], {}, name)
        found = packet(_WORD_OF_SYMBOL[symbol])
        fits = kinds[0] == "tensor" or symbol == "**"
        chosen = resolve(found, kinds, {}) if found and fits and "tensor" in kinds else None
        if chosen is None:
            raise self.refuse(at, _shown(at), f"{symbol} between tensors, or a tensor and a number")
        return self.create(at, chosen, [first, second], {}, name)

    def _prefix(self, at: ast.expr, op: ast.unaryop, operand: ast.expr, name: str | None) -> fx.Node:
        value = self.value(operand)
        minus = isinstance(op, ast.USub)
        if isinstance(value, fx.Node) and self._kind(value) == "tensor":
            target = torch.ops.aten.neg.default if minus else torch.ops.aten.bitwise_not.default
            return self.create(at, target, [value], {}, name)
        if isinstance(value, fx.Node) and minus and self._kind(value) in NUMBERS:
            return self.create(at, operator.neg, [value], {}, name)
        raise self.refuse(at, _shown(at))

    def _subscript(self, at: ast.Subscript, name: str | None) -> fx.Node:
        if (
            isinstance(at.value, ast.Attribute)
            and at.value.attr == "shape"
            and self.weight_path(at.value) is None
        ):
            return self._size(at, at.value.value, name)
        base = self.value(at.value)
        kind = self._kind(base)
        if kind == "tensors" or isinstance(kind, tuple):
            return self._item(at, base, name)
        if kind != "tensor":
            raise self.refuse(at, _shown(at), "a tensor or a list of tensors before the [")
        entries = at.slice.elts if isinstance(at.slice, ast.Tuple) else [at.slice]
        return self._tensor_subscript(at, base, entries, name)

    def _size(self, at: ast.Subscript, of: ast.expr, name: str | None) -> fx.Node:
        base, dim = self.value(of), self.value(at.slice)
        if self._kind(base) != "tensor" or type(dim) is not int:
            raise self.refuse(at, _shown(at), "tensor.shape[number]")
        return self.create(at, torch.ops.aten.sym_size.int, [base, dim], {}, name)

    def _item(self, at: ast.Subscript, base: Any, name: str | None) -> fx.Node:
        index = self.value(at.slice)
        if type(index) is not int:
            raise self.refuse(at, _shown(at), "a number in the brackets")
        return self.create(at, operator.getitem, [base, index], {}, name)

    def _tensor_subscript(
        self, at: ast.Subscript, base: Any, entries: list[ast.expr], name: str | None
    ) -> fx.Node:
        """`x[:, :, a:b]` and `x[..., 3, :]`: one slice or one number; `x[i, j]`: tensors."""
        aten = torch.ops.aten
        ahead = bool(entries) and isinstance(entries[0], ast.Constant) and entries[0].value is ...
        entry = entries[1] if ahead and len(entries) > 1 else entries[-1]
        others = entries[2:] if ahead else entries[:-1]
        dim = -1 - len(others) if ahead else len(others)
        if isinstance(entry, ast.Slice) and all(map(_is_bare, others)):
            ends = [None if end is None else self.value(end) for end in (entry.lower, entry.upper)]
            step = 1 if entry.step is None else self.value(entry.step)
            return self.create(at, aten.slice.Tensor, [base, dim, *ends, step], {}, name)
        if any(isinstance(each, ast.Slice) for each in entries) and not all(map(_is_bare, others)):
            raise self.refuse(at, _shown(at), "one slice at a time")
        if all(map(_is_bare, others)) and self._kind(index := self.value(entry)) == "int":
            return self.create(at, aten.select.int, [base, dim, index], {}, name)
        indices = [self.value(each) for each in entries]
        if any(self._kind(index) != "tensor" for index in indices):
            raise self.refuse(at, _shown(at), "a slice, a number, or tensors in the brackets")
        return self.create(at, aten.index.Tensor, [base, indices], {}, name)


def _is_special(atom: str) -> bool:
    return atom.startswith("__") or keyword.iskeyword(atom)


def _shown(at: ast.AST) -> str:
    return repr(ast.unparse(at)[:60])


def _is_bare(entry: ast.expr) -> bool:
    return isinstance(entry, ast.Slice) and entry.lower is None and entry.upper is None and entry.step is None


def _base(target: Any) -> str:
    return target._opname if isinstance(target, OpOverload) else str(target.__name__)
