"""Read a program's text back as a graph, without running a word of it.

The text is taken apart by Python's own `ast`; `moec.ir.expressions` accepts calls into the vocabulary,
regions, weights, sizes and constants, and nothing else. A text from a stranger can therefore be loaded: the
worst it can do is be refused, with its line.
"""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from moec.errors import ArtifactError

from .expressions import Expressions
from .graphs import root_module
from .identity import identified
from .kinds import NUMBERS
from .overloads import Kind, kind_of
from .region import Region
from .text import function_name
from .vocabulary import CONSTANTS, NAMESPACES, SIZE_FUNCTIONS, nearest_word, packet

VOCABULARY, OPERATORS = "moec.ir.vocabulary", "moec.runtime.ops"


@dataclass
class ParsedProgram:
    """Graphs without weights: `root`, and one graph for every function name that a region is printed as."""

    root: fx.Graph
    functions: dict[str, fx.Graph]

    def region_names(self) -> list[str]:
        """The regions that `root` calls, in calling order."""
        called = (str(node.target) for node in self.root.nodes if node.op == "call_module")
        return list(dict.fromkeys(called))

    def weight_names(self) -> list[str]:
        """Full names of the weights that are read, such as `ffn_3.up.weight`, in program order."""
        names = _weights_read("", self.root)
        for region in self.region_names():
            names += _weights_read(f"{region}.", self.functions[function_name(region)])
        return list(dict.fromkeys(names))

    def assemble(
        self,
        weights: Mapping[str, Tensor],
        regions: Mapping[str, Region] | None = None,
        transient: Collection[str] = (),
    ) -> fx.GraphModule:
        """A hierarchical GraphModule over `weights` (full name → Parameter or buffer), used as they are.

        `regions`: the record of each region. `transient`: buffers that stay out of the state dict. Raises
        `ArtifactError` naming a weight that the text reads and `weights` lacks.
        """
        missing = [name for name in self.weight_names() if name not in weights]
        if missing:
            raise ArtifactError("program text", f"it reads {missing[0]}", "a weight of that name", "")
        root = fx.GraphModule(root_module(), fx.Graph())
        for name in self.region_names():
            region = fx.GraphModule(root_module(), fx.Graph())
            region.meta["region"] = (regions or {}).get(name)
            root.add_module(name, region)
        for name, value in weights.items():
            _place(root, name, value, persistent=name not in transient)
        self._install(root)
        _order_children(root, weights)
        identified(root, 0)
        return root

    def _install(self, root: fx.GraphModule) -> None:
        """Give every module its graph; regions printed once get copies of their own."""
        for name in self.region_names():
            region = root.get_submodule(name)
            assert isinstance(region, fx.GraphModule)
            region.graph = copy.deepcopy(self.functions[function_name(name)])
        root.graph = copy.deepcopy(self.root)


def parse_program(text: str, *, file: str = "program.py", trusted: bool = False) -> ParsedProgram:
    """The program that `program_text` printed as `text` (by hand edited, perhaps).

    `file` stands for the text in errors. `trusted` admits every operator that torch has registered, in-place
    ones included; the text is not run either way. Raises `ArtifactError` naming the line and what was found.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ArtifactError(f"{file}:{line}", f"{error}", "the text of a program") from None
    reader = _Reader(file, trusted)
    try:
        return reader.program(tree)
    except RecursionError:
        raise ArtifactError(file, "an expression nested too deeply", "one operator a line") from None


class _Reader:
    """Goes through the statements of a module: imports, functions, aliases."""

    def __init__(self, file: str, trusted: bool) -> None:
        self.file, self.trusted = file, trusted
        self.imported: set[str] = set()
        self.functions: dict[str, fx.Graph] = {}
        self.returns: dict[str, Kind] = {}

    def program(self, tree: ast.Module) -> ParsedProgram:
        for statement in tree.body:
            self._statement(statement)
        root = self.functions.pop("forward", None)
        if root is None:
            raise ArtifactError(self.file, "no function `forward`", "def forward(self, tokens)", "")
        return ParsedProgram(root, self.functions)

    def _refuse(self, at: ast.AST, found: str, needed: str, nearest: str = "") -> ArtifactError:
        return ArtifactError(f"{self.file}:{getattr(at, 'lineno', 1)}", found, needed, nearest)

    def _statement(self, at: ast.stmt) -> None:
        match at:
            case ast.Import(names=[ast.alias(name="moec.runtime.ops", asname=None)]):
                return
            case ast.ImportFrom(module="moec.ir.vocabulary", names=names, level=0):
                self._import(at, names)
            case ast.FunctionDef(name=name) if name not in self.functions:
                self.functions[name], self.returns[name] = self._function(at)
            case ast.Assign(targets=names, value=ast.Name(id=known)) if known in self.functions:
                self._alias(at, names, known)
            case _:
                found = ast.unparse(at).splitlines()[0][:80]
                raise self._refuse(at, repr(found), "imports of the vocabulary, functions, region = region")

    def _import(self, at: ast.stmt, names: list[ast.alias]) -> None:
        for alias in names:
            known = alias.name in CONSTANTS or alias.name in SIZE_FUNCTIONS or alias.name in NAMESPACES
            if alias.asname or not (known or packet(alias.name) is not None):
                raise self._refuse(
                    at, f"import of {alias.name!r}", "words of the vocabulary", nearest_word(alias.name)
                )
            self.imported.add(alias.name)

    def _alias(self, at: ast.stmt, targets: list[ast.expr], known: str) -> None:
        for target in targets:
            if not isinstance(target, ast.Name) or target.id in self.functions or known == "forward":
                raise self._refuse(at, repr(ast.unparse(at)[:80]), "new names for a region above")
            self.functions[target.id], self.returns[target.id] = self.functions[known], self.returns[known]

    def _function(self, at: ast.FunctionDef) -> tuple[fx.Graph, Kind]:
        body = Expressions(self.file, self.imported, self.returns, _assigned(at), self.trusted)
        for argument in self._arguments(at):
            name = _node_name(argument.arg)
            body.declare(argument.arg, body.graph.placeholder(name), self._annotated(argument))
        *statements, last = at.body
        for statement in statements:
            self._assignment(body, statement)
        if not isinstance(last, ast.Return) or last.value is None:
            raise self._refuse(last, repr(ast.unparse(last)[:60]), "`return …` at the end")
        returned = body.value(last.value)
        body.graph.output(returned)
        return body.graph, kind_of(returned, body.kinds)

    def _arguments(self, at: ast.FunctionDef) -> list[ast.arg]:
        given = at.args
        odd: list[object] = [
            at.decorator_list,
            given.posonlyargs,
            given.vararg,
            given.kwonlyargs,
            given.kwarg,
        ]
        odd += [given.defaults, at.returns, getattr(at, "type_params", None)]
        if any(odd) or not given.args or given.args[0].arg != "self":
            found = f"def {at.name} with more than plain arguments"
            raise self._refuse(at, found, f"def {at.name}(self, x, …)")
        return given.args[1:]

    def _annotated(self, at: ast.arg) -> Kind:
        match at.annotation:
            case None:
                return "tensor"
            case ast.Name(id=kind) if kind in NUMBERS:
                return kind
        raise self._refuse(at, f"the argument {at.arg!r}", f"no annotation, or one of {', '.join(NUMBERS)}")

    def _assignment(self, body: Expressions, at: ast.stmt) -> None:
        match at:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name != "self":
                node = body.node(value, _node_name(name))
                body.variables[name] = node
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=value):
                self._unpack(body, at, names, value)
            case _:
                found = ast.unparse(at).splitlines()[0][:80]
                raise self._refuse(at, repr(found), "`name = …` and, at the end, `return …`")

    def _unpack(self, body: Expressions, at: ast.stmt, names: list[ast.expr], value: ast.expr) -> None:
        node = body.node(value, "")
        for position, target in enumerate(names):
            if not isinstance(target, ast.Name) or target.id == "self":
                raise self._refuse(at, repr(ast.unparse(target)[:60]), "plain names on the left")
            if target.id != "_":
                item = body.create(target, operator.getitem, [node, position], {}, _node_name(target.id))
                body.variables[target.id] = item


def _assigned(at: ast.FunctionDef) -> set[str]:
    """Names of the nodes that the function's text names itself; made-up names must avoid them."""
    stored = (n.id for n in ast.walk(at) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return {_node_name(name) for name in [*stored, *(argument.arg for argument in at.args.args)]}


def _node_name(variable: str) -> str:
    """The node a variable stands for: the printer appends `_` to keep off the words of the vocabulary."""
    return variable[:-1] if variable.endswith("_") and len(variable) > 1 else variable


def _weights_read(prefix: str, graph: fx.Graph) -> list[str]:
    targets = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    return [prefix + target for target in targets if target != "training"]


def _place(root: nn.Module, name: str, value: Tensor, *, persistent: bool) -> None:
    """Register `value` at its dotted name; only through modules, never over anything else."""
    *path, leaf = name.split(".")
    owner = root
    try:
        for atom in path:
            if atom not in owner._modules:
                owner.add_module(atom, nn.Module())
            owner = owner.get_submodule(atom)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value, persistent=persistent)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError("program text", f"the weight {name!r}: {error}", "a name of a weight") from None


def _order_children(root: nn.Module, names: Collection[str]) -> None:
    """Children in the order in which `names` first speaks of them, so that parameters keep their order."""
    first = list(dict.fromkeys(name.split(".")[0] for name in names))
    for name in [name for name in first if name in root._modules]:
        root._modules[name] = root._modules.pop(name)
