"""Small verbs on hierarchical graph modules that every pass needs: fork, read and place weights, tidy up."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from .region import region_of


def fork(root: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph and all its regions that shares every parameter and buffer with `root`."""
    tensors = [*root.parameters(), *root.buffers()]
    return _as_persistent_as(root, copy.deepcopy(root, {id(tensor): tensor for tensor in tensors}))


def graph_module(owner: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule over the weights of `owner`; buffers that stay out of the state dict go on doing so."""
    return _as_persistent_as(owner, fx.GraphModule(owner, graph))


def _as_persistent_as(source: nn.Module, copied: fx.GraphModule) -> fx.GraphModule:
    """`torch.fx` forgets which buffers are not persistent whenever it makes a GraphModule; remember it
    here."""
    present = dict(copied.named_modules())
    for name, module in source.named_modules():
        if name in present:
            kept = module._non_persistent_buffers_set & present[name]._buffers.keys()
            present[name]._non_persistent_buffers_set = kept
    return copied


def graph_modules(root: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The root (named '') and every region below it, with dotted names."""
    for name, module in root.named_modules():
        if isinstance(module, fx.GraphModule):
            yield name, module


def attribute(owner: nn.Module, target: str) -> object:
    """The value a `get_attr` node with this dotted target reads."""
    value: object = owner
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def named_weights(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has, tied ones under each."""
    yield from owner.named_parameters(remove_duplicate=False)
    yield from owner.named_buffers(remove_duplicate=False)


def weight_of(owner: nn.Module, node: fx.Node) -> Tensor | None:
    """The tensor a `get_attr` node reads, or None when the node is something else."""
    if node.op != "get_attr":
        return None
    value = attribute(owner, str(node.target))
    return value if isinstance(value, Tensor) else None


def place(owner: nn.Module, target: str, value: Tensor, *, persistent: bool = True) -> None:
    """Register `value` (Parameter or buffer) at the dotted `target`, making plain containers on the way."""
    *path, leaf = target.split(".")
    for atom in path:
        if not hasattr(owner, atom):
            owner.add_module(atom, nn.Module())
        owner = getattr(owner, atom)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value, persistent=persistent)


def drop_unused(owner: fx.GraphModule) -> None:
    """Erase dead nodes, then forget weights that no node of `owner`'s own graph reads any more.

    A call that writes to its argument is never dead: what it wrote is read through the argument.
    """
    owner.graph.eliminate_dead_code(is_impure_node=_is_kept)
    read = {str(node.target) for node in owner.graph.nodes if node.op in ("get_attr", "call_module")}
    _drop_below(owner, "", read)
    owner.graph.lint() if not _reads_training(owner.graph) else None
    owner.recompile()


def _is_kept(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or is_mutable(node)


def is_mutable(node: fx.Node) -> bool:
    """Whether a call writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _reads_training(graph: fx.Graph) -> bool:
    return any(node.op == "get_attr" and node.target == "training" for node in graph.nodes)


def _drop_below(module: nn.Module, prefix: str, read: set[str]) -> None:
    for table in (module._parameters, module._buffers):
        for leaf in [leaf for leaf in table if prefix + leaf not in read]:
            del table[leaf]
    for name, child in list(module._modules.items()):
        if child is None or prefix + name in read:
            continue
        if region_of(child) is None:
            _drop_below(child, f"{prefix}{name}.", read)
        if region_of(child) is not None or not _holds_anything(child):
            del module._modules[name]


def _holds_anything(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def root_module() -> nn.Module:
    """An empty owner for a new graph; `graph_module(root_module(), graph)` copies nothing from it."""
    return nn.Module()


def placeholder(graph: fx.Graph) -> fx.Node:
    """The first input of a graph (the tokens of a root, the `x` of a region)."""
    return next(node for node in graph.nodes if node.op == "placeholder")


def output(graph: fx.Graph) -> fx.Node:
    """The output node of a graph."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def training_flag(graph: fx.Graph) -> fx.Node:
    """The node that reads `self.training`, made right after the inputs when the graph has none."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == "training":
            return node
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        return graph.create_node("get_attr", "training", name="training")
