"""Move part of a graph into a sub-graph of its own, with the weights it reads.

`outline(root, nodes, …)` is the one way regions come into being. The sub-graph gets copies of the nodes, of
every weight expression they read (`t(w)`, `1 + w`) and of `self.training`; everything else they read
becomes an input. Weights move from the root to the region, and the table of origins follows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, fx

from .graphs import graph_module, place, root_module, weight_of
from .identity import made_from
from .origins import Origins
from .region import Region

NameWeight = Callable[[str], str]
CONSTANTS = "constants."  # where the capture puts tensors that a model makes on the way


def parameter_only(graph: fx.Graph) -> set[fx.Node]:
    """Nodes computed from weights and constants alone; they can be repeated wherever they are read."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (
            node.op == "call_function" and inputs and all(n in found for n in inputs)
        ):
            found.add(node)
    return found


def external_inputs(nodes: Sequence[fx.Node], weights: set[fx.Node]) -> list[fx.Node]:
    """What `nodes` read that is neither one of them nor a weight expression, in order of first use."""
    inside = set(nodes)
    return list(
        dict.fromkeys(
            n for node in nodes for n in node.all_input_nodes if n not in inside and n not in weights
        )
    )


def outline(
    root: fx.GraphModule,
    origins: Origins,
    nodes: Iterable[fx.Node],
    region: Region,
    *,
    inputs: Sequence[tuple[fx.Node, str]],
    outputs: Sequence[fx.Node],
    name_weight: NameWeight,
) -> tuple[fx.Node, Origins]:
    """Replace `nodes` of `root` by one call of a new region; returns the call and the changed origins.

    `inputs`: the values the region reads and what it calls them. `outputs`: the values that leave it (one:
    the call
    is that value; several: a tuple). `name_weight`: a weight's name in the root → its name in the region.
    """
    order = [node for node in root.graph.nodes if node in set(nodes)]
    builder = _Builder(root, name_weight)
    module = builder.build(order, inputs, outputs)
    module.meta["region"] = region
    name = _free_name(root, region.name)
    root.add_submodule(name, module)
    call = _insert_call(root, name, region, inputs, outputs)
    for node in reversed(order):
        if not node.users:
            root.graph.erase_node(node)
    return call, _moved_origins(root, origins, name, builder.placed)


def _free_name(root: fx.GraphModule, wanted: str) -> str:
    name = wanted
    while hasattr(root, name):
        name += "_"
    return name


def _insert_call(
    root: fx.GraphModule,
    name: str,
    region: Region,
    inputs: Sequence[tuple[fx.Node, str]],
    outputs: Sequence[fx.Node],
) -> fx.Node:
    graph = root.graph
    with graph.inserting_before(outputs[0]):
        call = graph.call_module(name, tuple(node for node, _ in inputs))
    made_from(call, *outputs, taking=())
    call.meta |= {"path": region.path, "source": region.source}
    if len(outputs) == 1:
        call.meta["val"] = outputs[0].meta.get("val")
        outputs[0].replace_all_uses_with(call, propagate_meta=False)
        return call
    for i, value in enumerate(outputs):
        with graph.inserting_before(outputs[0]):
            item = graph.create_node("call_function", operator.getitem, (call, i), {}, value.name)
        made_from(item, value, taking=("path", "source", "val", "placement"))
        value.replace_all_uses_with(item, propagate_meta=False)
    return call


class _Builder:
    """Builds the sub-graph; `placed` records root weight name → region weight name."""

    def __init__(self, root: fx.GraphModule, name_weight: NameWeight) -> None:
        self.root, self.name_weight = root, name_weight
        self.owner, self.graph = root_module(), fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.placed: dict[str, str] = {}

    def build(
        self, order: Sequence[fx.Node], inputs: Sequence[tuple[fx.Node, str]], outputs: Sequence[fx.Node]
    ) -> fx.GraphModule:
        for node, name in inputs:
            self.env[node] = self.graph.placeholder(name)
            self.env[node].meta["val"] = node.meta.get("val")
        for node in order:
            self._copy(node)
        results = tuple(self.env[node] for node in outputs)
        self.graph.output(results[0] if len(results) == 1 else results)
        return graph_module(self.owner, self.graph)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            for source in node.all_input_nodes:
                self._copy(source)
            self.env[node] = self._weight(node) if node.op == "get_attr" else self._call(node)
        return self.env[node]

    def _call(self, node: fx.Node) -> fx.Node:
        return self.graph.node_copy(node, lambda n: self.env[n])

    def _weight(self, node: fx.Node) -> fx.Node:
        value, target = weight_of(self.root, node), str(node.target)
        if value is None:  # the Python value `training`
            return made_from(self.graph.create_node("get_attr", target, name=target), node)
        self.placed[target] = self._unique(self.name_weight(target))
        place(self.owner, self.placed[target], value, persistent=_is_persistent(self.root, target))
        made = self.graph.get_attr(self.placed[target])
        made.meta = dict(node.meta)
        return made

    def _unique(self, name: str) -> str:
        taken, candidate = set(self.placed.values()), name
        while candidate in taken:
            candidate += "_"
        return candidate


def _is_persistent(root: fx.GraphModule, target: str) -> bool:
    path, _, leaf = target.rpartition(".")
    return leaf not in root.get_submodule(path)._non_persistent_buffers_set


def _moved_origins(root: fx.GraphModule, origins: Origins, name: str, placed: dict[str, str]) -> Origins:
    """Origins under the new names; the old rows stay while the root still reads the weight (tied weights)."""
    read = {str(node.target) for node in root.graph.nodes if node.op == "get_attr" and node.users}
    added = {f"{name}.{new}": origins[old] for old, new in placed.items() if old in origins}
    return origins.with_(added, {old for old in placed if old not in read})


def common_path(paths: Iterable[str]) -> str:
    """The user's module that holds all of these: the longest dotted path they share."""
    shared: list[str] = []
    for atoms in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(atoms)) > 1:
            break
        shared.append(atoms[0])
    return ".".join(shared)


def relative_names(targets: Iterable[str]) -> dict[str, str]:
    """Weight names relative to what they have in common: `h.0.attn.c_proj.weight` → `c_proj.weight`.

    Constants of the capture, which have no name in the user's model, are all called `constant`.
    """
    names = list(targets)
    paths = [name.split(".") for name in names if not name.startswith(CONSTANTS)]
    shared = 0
    while paths and all(len(p) > shared + 1 for p in paths) and len({p[shared] for p in paths}) == 1:
        shared += 1
    shared = max(min([shared, *(len(p) - 2 for p in paths)]), 0)
    return {
        name: "constant" if name.startswith(CONSTANTS) else ".".join(name.split(".")[shared:])
        for name in names
    }


def tensors_read(root: fx.GraphModule, nodes: Iterable[fx.Node], weights: set[fx.Node]) -> list[str]:
    """Names of the weights that `nodes` read, directly or through weight expressions, in order."""
    found: dict[str, None] = {}

    def visit(node: fx.Node) -> None:
        if node.op == "get_attr" and isinstance(weight_of(root, node), Tensor):
            found[str(node.target)] = None
        for source in node.all_input_nodes:
            if source in weights:
                visit(source)

    for node in nodes:
        for source in node.all_input_nodes:
            if source in weights:
                visit(source)
    return list(found)
