"""Leave out what the region of positions computes for nobody.

before:  cos, sin, cos_b, sin_b, mask = positions(tokens)      cos and sin were read by a layer that is gone
after:   cos_b, sin_b, mask = positions(tokens)
"""

from __future__ import annotations

import operator

from torch import fx

from moec.ir import region_of
from moec.ir.graphs import drop_unused, output


def trim_positions(root: fx.GraphModule) -> None:
    """Make the region of positions of `root` return what is read, and compute no more; in place."""
    for call in [node for node in root.graph.nodes if node.op == "call_module"]:
        module = root.get_submodule(str(call.target))
        region = region_of(module)
        if region is not None and region.kind == "positions" and isinstance(module, fx.GraphModule):
            _trim(root, call, module)


def _trim(root: fx.GraphModule, call: fx.Node, module: fx.GraphModule) -> None:
    end = output(module.graph)
    results = end.args[0]
    items = {user.args[1]: user for user in call.users if user.target is operator.getitem}
    if not isinstance(results, tuple | list) or len(items) == len(results):
        return
    read = sorted(items)  # type: ignore[type-var]
    left = tuple(results[index] for index in read)  # type: ignore[index]
    end.args = (left if len(left) > 1 else left[0],)
    for place, index in enumerate(read):
        items[index].args = (call, place)
    if len(read) == 1:
        only = items[read[0]]
        call.meta["val"] = only.meta.get("val")
        only.replace_all_uses_with(call, propagate_meta=False)
        root.graph.erase_node(only)
    else:
        call.meta.pop("val", None)
    drop_unused(module)
