"""A program as Python that runs and that a person can read.

Regions come first, those that are alike only once (`ffn_1 = ffn_2 = ffn_0`); then `forward`, block by block,
with the symbolic shape of every value at the right.

`program_text` prints, `moec.ir.parse.parse_program` reads the same text back without running it, and
`moec.ir.bind.bind` runs it on a program's weights.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable, Sequence

from torch import fx
from torch._ops import OpOverload

from .described import Described
from .graphs import named_weights
from .kinds import NUMBERS, infer_kinds
from .layout import Function, Line, function_text, import_lines
from .overloads import Kind
from .region import KINDS, region_of
from .spelling import Spelling, printable

_REGION_NAME = re.compile(rf"({'|'.join(KINDS)})(_[0-9]+)?\Z")


def program_text(root: fx.GraphModule, *title: str) -> str:
    """The whole program below `root` as Python: imports, one function per distinct region, then `forward`.

    `title`: lines of text put at the top as comments. Reads the graph and `node.meta` (`val`, `path`,
    `source`); changes nothing. Raises `ValueError` when a node holds a value that no text can express.
    """
    return _Printer(root).text(title)


def unpacked_name(base: str, *taken: Collection[str]) -> str:
    """The name of a value that the text unpacks and so does not name: `split`, then `split_1`, …"""
    candidate, count = base, 0
    while any(candidate in names for names in taken):
        count += 1
        candidate = f"{base}_{count}"
    return candidate


def kinds_below(root: fx.GraphModule) -> dict[str, dict[fx.Node, Kind]]:
    """The kinds of the nodes of `root` ('') and of the regions that it calls; a region's for its first call.

    Raises `ValueError` where a region calls another: no text says that.
    """
    found: dict[str, dict[fx.Node, Kind]] = {}

    def infer(path: str, module: fx.GraphModule, inputs: tuple[Kind, ...]) -> Kind:
        def call(node: fx.Node, given: tuple[Kind, ...]) -> Kind:
            child = module.get_submodule(str(node.target))
            if path:
                raise ValueError(f"{node.name} in {path}: a region cannot call another")
            if not isinstance(child, fx.GraphModule):
                return "unknown"
            return infer(str(node.target), child, given)

        kinds, returned = infer_kinds(module.graph, inputs, call)
        found.setdefault(path, kinds)
        return returned

    infer("", root, ())
    return found


class _Printer:
    """Prints one root: once, and again where a variable has the name of a word that turned out to be used."""

    def __init__(self, root: fx.GraphModule) -> None:
        self.root = root
        self.values = Described(root)
        self.kinds = kinds_below(root)

    def text(self, title: Sequence[str]) -> str:
        functions, words = self._functions(set())
        if any(node.name in words for kinds in self.kinds.values() for node in kinds):
            functions, words = self._functions(words)
        chunks = [*(f"# {printable(line)}".rstrip() for line in title)]
        parts = ["\n".join(chunks)] if chunks else []
        parts.append(import_lines(words))
        parts += [function_text(function) for function in functions]
        return "\n\n\n".join(part for part in parts if part) + "\n"

    def _functions(self, taken: set[str]) -> tuple[list[Function], set[str]]:
        """Every distinct function, regions in calling order and `forward` last, and the words they use."""
        distinct: dict[str, Function] = {}
        words: set[str] = set()
        for path in [*(path for path in self.kinds if path), ""]:
            module = self.root.get_submodule(path)
            assert isinstance(module, fx.GraphModule)
            spelling = Spelling(self.kinds[path], taken)
            function = self._function(path, module, spelling)
            words |= spelling.words
            same = distinct.setdefault(function.body, function)
            same.regions.append((function_name(path), region_of(module)))
        return list(distinct.values()), words

    def _function(self, path: str, module: fx.GraphModule, spelling: Spelling) -> Function:
        nodes = list(module.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        declared = [f"{spelling.name(node)}{_annotation(self.kinds[path][node])}" for node in inputs]
        header = f"({', '.join(['self', *declared])})"
        return Function(header, list(self._lines(nodes, module, spelling)), _weights_placed(module))

    def _lines(self, nodes: list[fx.Node], module: fx.GraphModule, spelling: Spelling) -> Iterable[Line]:
        block, skipped = "", set[fx.Node]()
        for node in nodes:
            if node.op in ("placeholder", "get_attr") or node in skipped:
                continue
            if node.op == "output":
                yield Line(f"return {spelling.returned(node.args[0])}", "", block)
                continue
            block = block_of(node, module, block) if module is self.root else ""
            items = unpacked(node, module)
            skipped.update(item for item in items if item is not None)
            yield self._line(node, items, spelling, block)

    def _line(self, node: fx.Node, items: list[fx.Node | None], spelling: Spelling, block: str) -> Line:
        names = [spelling.name(item) if item is not None else "_" for item in items] or [spelling.name(node)]
        code = f"{', '.join(names)}{',' if len(items) == 1 else ''} = {spelling.expression(node)}"
        parts = (self.values.of(node.meta.get("val")), str(node.meta.get("placement") or ""))
        return Line(code, " · ".join(filter(None, parts)), block, str(node.meta.get("source") or ""))


def _weights_placed(module: fx.GraphModule) -> list[str]:
    """`up.weight: dim 0 over expert_4; …` for the weights of this graph that are dealt out to ranks."""
    placed = {
        str(node.target): str(node.meta["placement"])
        for node in module.graph.nodes
        if node.op == "get_attr" and node.meta.get("placement")
    }
    return [f"{name}: {placed[name]}" for name, _ in named_weights(module) if name in placed]


def function_name(path: str) -> str:
    """The function that a region's body is printed as; the root is `forward`."""
    if not path or _REGION_NAME.match(path):
        return path or "forward"
    return "region_" + "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in path)


def _annotation(kind: Kind) -> str:
    """Inputs are tensors unless they say otherwise: `S: int`."""
    if kind not in ("tensor", "unknown", *NUMBERS):
        raise ValueError(f"an input of kind {kind} cannot be printed; pass its parts one by one")
    return f": {kind}" if kind in NUMBERS else ""


def unpacked(node: fx.Node, module: fx.GraphModule) -> list[fx.Node | None]:
    """The items of a list-valued node by position, unread ones None; empty when it is used in any other way.

    Such a node needs no name in the text, and its items stand where it is computed.
    """
    items: list[fx.Node | None] = [None] * (_length(node, module) if node.users else 0)
    for user in node.users:
        index = user.args[1] if user.target is operator.getitem and user.args[0] is node else None
        if type(index) is not int or not 0 <= index < len(items) or items[index] is not None:
            return []
        items[index] = user
    return items


def _length(node: fx.Node, module: fx.GraphModule) -> int:
    """How many values `node` gives; 0 when that is not known or it gives just one."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return len(value)
    if isinstance(node.target, OpOverload):
        count = len(node.target._schema.returns)
        return count if count > 1 else 0
    child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(child, fx.GraphModule):
        return 0
    returned = next(iter(reversed(child.graph.nodes))).args[0]
    return len(returned) if isinstance(returned, tuple | list) else 0


def block_of(node: fx.Node, module: fx.GraphModule, present: str) -> str:
    """`3 · transformer.h.3`, from the module path of a node or of the region it calls; '' outside of blocks.

    A node that remembers no path belongs to the block it stands in.
    """
    path = _path_of(node, module)
    if not path:
        return present
    atoms = path.split(".")
    number = next((i for i, atom in enumerate(atoms) if atom.isdigit()), None)
    return f"{atoms[number]} · {'.'.join(atoms[: number + 1])}" if number is not None else ""


def _path_of(node: fx.Node, module: fx.GraphModule) -> str:
    region = region_of(module.get_submodule(str(node.target))) if node.op == "call_module" else None
    return region.path if region is not None and region.path else str(node.meta.get("path") or "")
