"""What a named part of the program is: an attention, a feed-forward, an expert layer, a mix of two branches.

A region is a sub-`GraphModule` called from the root graph. Its `Region` record sits in
`graph_module.meta["region"]` and survives forks, printing and saving.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

KINDS = ("positions", "attention", "ffn", "branch", "dispatch", "moe", "mix")


@dataclass(frozen=True)
class Region:
    """One region: its `kind`, its layer `index`, and where the user wrote it.

    `path` is the user's module path (`transformer.h.3.mlp`), `source` is `file.py:line`; both may be empty
    when
    the model was captured without them. `roles` maps a role (`up`, `gate`, `down`, …) to the dotted name of
    the weight inside the region; `settings` holds what the plan chose for it (experts, top_k, …).
    """

    kind: str
    index: int
    path: str = ""
    source: str = ""
    roles: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name it is called by in the program: `ffn_3`; there is one `positions` at most."""
        return self.kind if self.kind == "positions" else f"{self.kind}_{self.index}"


def region_of(module: object) -> Region | None:
    """The region a sub-module stands for, or None when it is not one."""
    meta = getattr(module, "meta", None)
    found = meta.get("region") if isinstance(meta, dict) else None
    return found if isinstance(found, Region) else None


def regions(root: fx.GraphModule, kind: str | None = None) -> dict[str, fx.GraphModule]:
    """The regions of a root graph in calling order, name → sub-graph; only those of `kind` when given."""
    found: dict[str, fx.GraphModule] = {}
    for node in root.graph.nodes:
        if node.op != "call_module":
            continue
        module = root.get_submodule(str(node.target))
        region = region_of(module)
        if region is not None and isinstance(module, fx.GraphModule) and kind in (None, region.kind):
            found[str(node.target)] = module
    return found
