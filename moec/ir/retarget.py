"""The same graph in another floating dtype or on another device.

A captured graph carries dtypes and devices as constants (`to(x, float32)`, `arange(S, device="cpu")`);
moving its weights alone would leave those behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from .graphs import fork, graph_modules


def in_dtype(
    root: fx.GraphModule, dtype: torch.dtype, converted: dict[int, Tensor] | None = None
) -> fx.GraphModule:
    """A copy of `root` whose weights, casts and constants are all of floating `dtype`; nothing is shared
    with it.

    Tied weights stay tied. In fp64 this is what rewrites are compared in: casts to fp32 inside the model
    widen too, so what remains between two graphs is the rewrite alone. `converted`: id of a weight → the
    one to use for it, added to; two graphs converted with the same table share, as before, the weights
    they shared.
    """
    copied = fork(root)
    _convert_weights(copied, dtype, {} if converted is None else converted)
    for _, module in graph_modules(copied):
        changed = [_retype(node, dtype) for node in module.graph.nodes]
        if any(changed):
            module.recompile()
    return copied


def _convert_weights(root: fx.GraphModule, dtype: torch.dtype, converted: dict[int, Tensor]) -> None:
    for module in root.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, value in table.items():
                if value is not None:
                    if id(value) not in converted:
                        converted[id(value)] = _converted(value, dtype)
                    table[name] = converted[id(value)]


def _converted(value: Tensor, dtype: torch.dtype) -> Tensor:
    made = value.detach().to(dtype, copy=True) if value.is_floating_point() else value.detach().clone()
    return nn.Parameter(made, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else made


def _retype(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether the node named a dtype; it names `dtype` now."""
    if node.op != "call_function" or not _names_dtype(node):
        return False
    node.args = _mapped(node.args, lambda v: _dtype(v, dtype))
    node.kwargs = _mapped(node.kwargs, lambda v: _dtype(v, dtype))
    return True


def _names_dtype(node: fx.Node) -> bool:
    return any(isinstance(v, torch.dtype) for v in [*node.args, *node.kwargs.values()])


def _dtype(value: Any, dtype: torch.dtype) -> Any:
    return dtype if isinstance(value, torch.dtype) and value.is_floating_point else value


def on_device(root: fx.GraphModule, device: torch.device) -> None:
    """Point every device constant of `root` and its regions at `device`, in place (weights are not moved)."""
    for _, module in graph_modules(root):
        changed = False
        for node in module.graph.nodes:
            if node.op == "call_function" and _names_device(node):
                node.args = _mapped(node.args, lambda v: _device(v, device))
                node.kwargs = _mapped(node.kwargs, lambda v: _device(v, device))
                changed = True
        if changed:
            module.recompile()


def _names_device(node: fx.Node) -> bool:
    return any(isinstance(v, torch.device) for v in [*node.args, *node.kwargs.values()])


def _device(value: Any, device: torch.device) -> Any:
    return device if isinstance(value, torch.device) else value


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    return change(value)
