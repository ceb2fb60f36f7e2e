"""The plan: what is to become of a dense model, as one frozen value with a TOML face and a Python face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field, ValidationError

from moec.errors import PlanError
from moec.plan.layers import Layers
from moec.plan.machine import Compile, Parallel
from moec.plan.moe import LayerSettings, Moe
from moec.plan.section import Section, Source, plan_error
from moec.plan.shipped import shipped_names, shipped_text
from moec.plan.source import locate, parse, read
from moec.plan.training import Distill, Student, Train


class Plan(Section):
    """A whole plan. An empty one leaves the model dense; tables that are left out have their defaults."""

    moe: Moe | None = Field(default=None, description="Sparse layers; left out, the model stays dense.")
    student: Student | None = Field(
        default=None, description="A shallower student; left out, the depth stays."
    )
    distill: Distill | None = Field(default=None, description="A teacher's term in the loss; left out: none.")
    parallel: Parallel = Field(default=Parallel(), description="Placement over ranks.")
    train: Train = Field(default=Train(), description="Training.")
    compile: Compile = Field(default=Compile(), description="Capture, checks and backend.")

    @classmethod
    def resolve(cls, plan: str | Path | Plan | Mapping[str, Any] | None) -> Plan:
        """The plan meant by a path, the name of a shipped plan, a mapping, a plan, or None (the empty plan).

        Text names a file when it ends in `.toml` or holds a slash, and a shipped plan otherwise.
        """
        if plan is None or isinstance(plan, Plan):
            return plan or cls()
        if isinstance(plan, Mapping):
            return cls._checked(plan, Source("plan"))
        if not isinstance(plan, str | Path):
            raise PlanError(
                "plan", f"a {type(plan).__name__}", "a path, a shipped plan's name, a Plan, or None"
            )
        if isinstance(plan, str) and not plan.endswith(".toml") and "/" not in plan and "\\" not in plan:
            return cls.shipped(plan)
        return cls.from_toml(plan)

    @classmethod
    def from_toml(cls, path: str | Path) -> Plan:
        """Read a plan file; PlanError names the file, the line and the nearest valid thing."""
        return cls.from_text(read(Path(path)), str(path))

    @classmethod
    def from_text(cls, text: str, name: str = "plan") -> Plan:
        """Read a plan from TOML text; `name` stands for the file in errors."""
        return cls._checked(parse(text, name), Source(name, locate(text)))

    @classmethod
    def shipped(cls, name: str) -> Plan:
        """One of the plans that come with moec; `Plan.shipped_names()` lists them."""
        return cls.from_text(shipped_text(name), f"{name}.toml")

    @staticmethod
    def shipped_names() -> list[str]:
        """Names that `Plan.shipped` knows, sorted."""
        return shipped_names()

    @classmethod
    def _checked(cls, values: Mapping[str, Any], source: Source) -> Plan:
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise plan_error(error, cls, source) from None

    def fitted(self, *max_positions: int | None) -> Plan:
        """The plan for models that have so many positions each (None: any number).

        `train.sequence`, where it was left out, is no more than all have; what was given stays as it is.
        """
        sequence = min([self.train.sequence, *(most for most in max_positions if most is not None)])
        if "sequence" in self.train.model_fields_set or sequence == self.train.sequence:
            return self
        train = self.train.model_copy(update={"sequence": sequence})
        return self.model_copy(update={"train": train})

    def to_toml(self) -> str:
        """The plan as TOML text, every value spelled out; `Plan.from_text` reads it back as an equal plan."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def layer_settings(self, num_sites: int, names: Sequence[str]) -> dict[int, LayerSettings]:
        """Settings of each feed-forward that becomes sparse, by ordinal, ascending; empty for a dense plan.

        `names[i]` is the module path of site i. An override's selector counts the selected sites alone (see
        `Override`). Raises PlanError when a selector selects nothing or leaves the list, or when overrides
        together ask for fewer experts than a token is sent to.
        """
        if self.moe is None:
            return {}
        base = Layers.parse(self.moe.layers)
        sites = base.resolve(num_sites, names, "moe.layers")
        among = f"layers that moe.layers = {base.text} selects, counted by themselves"
        selected = [names[site] for site in sites]
        chosen = [
            Layers.parse(override.layers).resolve(
                len(sites), selected, f"moe.override[{position}].layers", among
            )
            for position, override in enumerate(self.moe.override)
        ]
        return {
            site: self._merged(rank, chosen, f"layer {site} ({names[site]})")
            for rank, site in enumerate(sites)
        }

    def _merged(self, rank: int, chosen: Sequence[list[int]], layer: str) -> LayerSettings:
        """Settings of the selected site number `rank`; `chosen[i]` are the ranks that override i hits."""
        assert self.moe is not None
        hits = [override for override, ranks in zip(self.moe.override, chosen, strict=True) if rank in ranks]
        try:
            return self.moe.overridden(hits)
        except PlanError as error:
            where = f"moe.override, together at {layer}"
            raise PlanError(where, error.found, error.needed, error.nearest) from None
