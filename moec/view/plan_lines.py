"""The plan as text, and which of its lines asked for a region."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from moec.ir import Region, region_of, regions
from moec.plan import LayerSettings, Plan
from moec.plan.layers import Layers
from moec.plan.source import locate

SPARSE = ("moe", "branch", "dispatch", "mix")
SPREAD = ("data", "expert", "slice", "all_to_all", "node")
DEALT = ("data", "tensor")


@dataclass
class PlanLines:
    """`text`: the lines of a plan; `of`: the indices of those that made a region what it is.

    `root`: the graph that came of it; its feed-forwards and expert layers are what selectors count. `placed`:
    whether it lies on ranks, so that `[parallel]` counts.
    """

    plan: Plan | None
    root: fx.GraphModule
    placed: bool

    def __post_init__(self) -> None:
        toml = self.plan.to_toml() if self.plan is not None else ""
        self.text = tuple(toml.rstrip("\n").split("\n")) if toml else ()
        self._lines = locate(toml)
        self._overrides = self._overridden()

    def of(self, region: Region) -> tuple[int, ...]:
        """Lines of `[moe]`, the overrides that match, and of `[parallel]` where it is placed; ascending."""
        found: set[int] = set()
        if region.kind in SPARSE and self.plan is not None and self.plan.moe is not None:
            found |= {self._at("moe", key) for key in ("layers", *LayerSettings.model_fields)}
            for number in self._overrides.get(region.index, ()):
                override = self.plan.moe.override[number]
                found |= {self._at("moe", "override", number, key) for key in ("layers", *override.changes())}
        if self.placed:
            keys = SPREAD if region.kind in SPARSE[:3] else DEALT
            found |= {self._at("parallel", key) for key in keys}
        return tuple(sorted(found - {-1}))

    def _at(self, *path: str | int) -> int:
        return self._lines.get(path, 0) - 1

    def _overridden(self) -> dict[int, list[int]]:
        """Number of a layer → the overrides that match it."""
        found: dict[int, list[int]] = {}
        if self.plan is None or self.plan.moe is None:
            return found
        selected = _named(self.root, "moe")
        for number, override in enumerate(self.plan.moe.override):
            names = [name for _, name in selected]
            for rank in Layers.parse(override.layers).resolve(len(names), names):
                found.setdefault(selected[rank][0], []).append(number)
        return found


def _named(root: fx.GraphModule, kind: str) -> list[tuple[int, str]]:
    """(index, path) of the regions of a kind, in calling order."""
    found = [(name, region_of(module)) for name, module in regions(root, kind).items()]
    return [(region.index, region.path or name) for name, region in found if region is not None]
