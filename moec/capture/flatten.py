"""The exported program as one flat graph that owns its weights under the user's names.

`torch.export` lifts weights to inputs and wraps `no_grad` and `autocast` blocks into sub-graphs. Here weights
become `get_attr` nodes again, the blocks are inlined (values made under `no_grad` are detached), and each
node remembers the user's module path and source line.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from moec.errors import CaptureError
from moec.ir import Origin, Origins
from moec.ir.graphs import graph_module, is_mutable, place, root_module

WRAPPER = "model."
FRAME = re.compile(r'File "([^"]+)", line (\d+)(?:, in [^\n]*\n(?!  File ")([^\n]*))?')


def flatten(exported: ExportedProgram, model: nn.Module) -> tuple[fx.GraphModule, Origins]:
    """A flat GraphModule `tokens → logits` and the origin of each of its weights."""
    _refuse_mutation(exported)
    builder = _Builder(exported, model)
    return builder.build(), Origins(builder.origins)


def _refuse_mutation(exported: ExportedProgram) -> None:
    """Refuse writes to weights and buffers, also through views of them."""
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        source = _written(node)
        if source is not None and source.op == "placeholder":
            name = str(specs[source.name].target or "its input").removeprefix(WRAPPER)
            raise CaptureError(
                "capture", f"forward writes to the buffer {name}",
                "a forward without side effects (turn caches and running statistics off)",
            )  # fmt: skip


def _written(node: fx.Node) -> fx.Node | None:
    """The value whose memory a call writes to, or None when it writes to none."""
    if not is_mutable(node):
        return None
    source = node.args[0]
    while isinstance(source, fx.Node) and source.op == "call_function" and _is_view(source):
        source = source.args[0]
    return source if isinstance(source, fx.Node) else None


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info is not None


class _Builder:
    """Copies the exported graph node by node into a graph whose weights are attributes of its owner."""

    def __init__(self, exported: ExportedProgram, model: nn.Module) -> None:
        self.exported, self.model = exported, model
        self.owner = root_module()
        self.graph = fx.Graph()
        self.origins: dict[str, Origin] = {}
        self.env: dict[fx.Node, Any] = {}
        self.structural: dict[str, str] = {}
        self.first_name = {id(p): name for name, p in [*model.named_parameters(), *model.named_buffers()]}

    def build(self) -> fx.GraphModule:
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        nodes = list(self.exported.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        tokens = next(node for node in inputs if specs[node.name].kind == InputKind.USER_INPUT)
        self.env[tokens] = self.graph.placeholder("tokens")
        for node in inputs:
            if node is not tokens:
                self.env[node] = self._weight(node, specs[node.name])
        self._copy(nodes, self.exported.graph_module)
        return graph_module(self.owner, self.graph)

    def _weight(self, node: fx.Node, spec: Any) -> fx.Node | None:
        if not node.users:
            return None
        name, value, persistent = self._stored(spec)
        structural = self.structural.setdefault(name, safe_name(name, set(self.structural.values())))
        place(self.owner, structural, value, persistent=persistent)
        if persistent:
            self.origins[structural] = Origin(name)
        return self.graph.get_attr(structural)

    def _stored(self, spec: Any) -> tuple[str, Tensor, bool]:
        """Name, tensor and persistence of a lifted input; the user's own tensor where there is one."""
        target = spec.target
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            value = _read(self.model, target.removeprefix(WRAPPER))
            name = self.first_name.get(id(value), target.removeprefix(WRAPPER))
            return name, value, spec.kind == InputKind.PARAMETER or bool(spec.persistent)
        value = self.exported.constants[target]
        return f"constants.{target.replace('.', '_')}", value, False

    def _copy(self, nodes: list[fx.Node], owner: nn.Module) -> Any:
        for node in nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return self._output(node)
            self.env[node] = self._inline(node, owner) if _is_block(node) else self._copy_one(node, owner)
        return None

    def _output(self, node: fx.Node) -> Any:
        values = fx.node.map_arg(node.args[0], lambda n: self.env[n])
        if node.graph is self.exported.graph:
            self.graph.output(values[-1])  # type: ignore[index]
        return values

    def _copy_one(self, node: fx.Node, owner: nn.Module) -> fx.Node | None:
        if node.op == "get_attr" and not isinstance(_read(owner, str(node.target)), Tensor):
            return None  # the sub-graph of a block; it is inlined where it is called
        if node.op == "get_attr":
            place(self.owner, f"constants.{node.name}", _read(owner, str(node.target)), persistent=False)
            return self.graph.get_attr(f"constants.{node.name}")
        copied = self.graph.node_copy(node, lambda n: self.env[n])
        copied.meta = {"val": node.meta.get("val"), "path": _path(node), "source": _source(node)}
        return copied

    def _inline(self, node: fx.Node, owner: nn.Module) -> Any:
        """Copy a `no_grad` or `autocast` block in place of the call; returns its outputs."""
        block = next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
        inner = _read(owner, str(block.target))
        assert isinstance(inner, fx.GraphModule)
        operands = node.args[node.args.index(block) + 1 :]
        names = [n for n in inner.graph.nodes if n.op == "placeholder"]
        self.env.update({name: self.env[value] for name, value in zip(names, operands, strict=True)})  # type: ignore[index]
        values = self._copy(list(inner.graph.nodes), inner)
        if "grad" in str(node.target) and not node.args[0]:
            values = [self.graph.call_function(torch.ops.aten.detach.default, (v,)) for v in values]
        return list(values) if isinstance(values, (list, tuple)) else values


def _is_block(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) in (
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
    )


def _read(owner: nn.Module, target: str) -> Any:
    value: Any = owner
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def safe_name(name: str, taken: Collection[str] = ()) -> str:
    """`name` as a path of plain words that no other weight in `taken` has.

    The first word is changed when a GraphModule already means something by it (`graph`, `code`), and so is
    every character that could not stand in generated code (quotes, line ends).
    """
    first, *rest = ("".join(c if c.isalnum() else "_" for c in atom) or "_" for atom in name.split("."))
    own = hasattr(fx.GraphModule, first) or first in ("training", "graph")
    safe = ".".join([f"{first}_" if own else first, *rest])
    while safe in taken:
        safe += "_"
    return safe


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if not entry[0].startswith("_empty")]
    return paths[-1].removeprefix("model").removeprefix(".") if paths else ""


def _source(node: fx.Node) -> str:
    """`file.py:line` of the innermost frame that is the user's, not torch's."""
    return _written_at(node)[0]


def source_lines(exported: ExportedProgram) -> dict[str, str]:
    """The user's lines that the nodes of `exported` were written on, by `file.py:line`; each as it was when
    the model ran, and none where that could not be read."""
    found = dict(map(_written_at, exported.graph.nodes))
    return {source: line for source, line in found.items() if source and line}


def _written_at(node: fx.Node) -> tuple[str, str]:
    """Where a node was written, and what stands there; '' for what is not known."""
    frames = FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0] and "\\torch\\" not in frame[0]]
    if not own:
        return "", ""
    file, line, code = own[-1]
    return f"{file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line}", code.strip()
