"""Hardware: what a device can do, what links carry, how many of each there are. A TOML file, or measured.

    Hardware.shipped("a100x64")        # eight nodes of eight, from the shipped file a100.toml
    Hardware.from_toml("ours.toml")
    Hardware.named("a100x64.toml")     # a file where there is one, else a shipped one of that name

Numbers are SI: bytes, seconds, operations and bytes a second. A shipped file says where each one comes from.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from moec.cost.machine.device import Device
from moec.cost.machine.link import Link, Way
from moec.errors import MeshError, PlanError, nearest
from moec.plan.section import Section, Source, complaint, plan_error
from moec.plan.source import locate, parse, read

if TYPE_CHECKING:
    from moec.cost.machine.topology import Topology

SHIPPED = Path(__file__).parent / "shipped"
_COUNTED = re.compile(r"(?P<name>.+?)x(?P<world>\d+)")


class Hardware(Section):
    """A machine or a cluster of equal ones."""

    device: Device = Field(description="Every device is one of these.")
    inside: Link = Field(description="Between devices of one node, each with a link of its own to a switch.")
    between: Link | None = Field(default=None, description="Between nodes; left out: there is one node.")
    per_node: int = Field(default=1, ge=1, description="Devices of a node.")
    nodes: int = Field(default=1, ge=1, description="Nodes.")
    cards: int | None = Field(
        default=None,
        ge=1,
        description="Network cards of a node; left out: one for each device.",
    )
    ways: tuple[Way, ...] = Field(
        default=(), description="How collectives may go; the fastest one is taken. Left out: plain rings."
    )

    @field_validator("ways", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _connected(self) -> Hardware:
        if self.nodes > 1 and self.between is None:
            raise complaint(f"nodes = {self.nodes}", "a table [between]: what connects them", at=("nodes",))
        if self.cards is not None and self.per_node % self.cards:
            needed = f"a number that divides per_node = {self.per_node}"
            raise complaint(f"cards = {self.cards}", needed, at=("cards",))
        return self

    @property
    def world(self) -> int:
        """All devices."""
        return self.nodes * self.per_node

    @property
    def card_bandwidth(self) -> float:
        """Bytes a second between nodes that one device has where all devices of its node send at once."""
        if self.between is None:
            return float("inf")
        cards = self.per_node if self.cards is None else self.cards
        return self.between.bandwidth * cards / self.per_node

    def with_world(self, world: int) -> Hardware:
        """The same devices and links, `world` of them: whole nodes, or a part of one.

        Raises `MeshError` for a number that neither divides a node nor is made of nodes, and where nothing
        connects two nodes.
        """
        if world < 1 or (world % self.per_node and self.per_node % world):
            near = max(world // self.per_node, 1) * self.per_node
            needed = f"a multiple or a divisor of {self.per_node}, the devices of a node"
            raise MeshError(self.device.name, f"{world} devices", needed, str(near))
        if world <= self.per_node:
            cards = None if self.cards is None else max(1, self.cards * world // self.per_node)
            return self.model_copy(update={"nodes": 1, "per_node": world, "cards": cards})
        if self.between is None:
            found = f"{world} devices, {self.per_node} of them to a node, and no [between]"
            raise MeshError(self.device.name, found, "what connects nodes")
        return self.model_copy(update={"nodes": world // self.per_node})

    def topology(self) -> Topology:
        """What is connected to what, as a networkx graph."""
        from moec.cost.machine.topology import Topology  # networkx takes a while to import, and few ask

        return Topology(self)

    def require_world(self, world: int, what: str = "the program") -> None:
        """Raises `MeshError` where there are fewer devices than ranks."""
        if world > self.world:
            found = f"{self.world} devices ({self.nodes} × {self.per_node} {self.device.name})"
            raise MeshError(what, found, f"{world}, one for each rank")

    @classmethod
    def from_toml(cls, path: str | Path) -> Hardware:
        """Read a hardware file; `PlanError` names file, line and nearest valid key."""
        return cls.from_text(read(Path(path)), str(path))

    @classmethod
    def from_text(cls, text: str, name: str = "hardware") -> Hardware:
        """Read it from TOML text; `name` stands for the file in errors."""
        try:
            return cls.model_validate(dict(parse(text, name)))
        except ValidationError as error:
            raise plan_error(error, cls, Source(name, locate(text))) from None

    @classmethod
    def shipped(cls, name: str) -> Hardware:
        """One of those that come with moec (`shipped_names()`): `a100`, or `a100x64` for 64 devices of it.

        Raises `PlanError` for an unknown name, `MeshError` for a number that is not of whole nodes.
        """
        counted = _COUNTED.fullmatch(name)
        stem = name if (SHIPPED / f"{name}.toml").exists() or not counted else counted["name"]
        file = SHIPPED / f"{stem}.toml"
        if not file.exists():
            known = cls.shipped_names()
            needed = f"{', '.join(known)}; with a number of devices: {known[0]}x64"
            raise PlanError("hardware", f"no hardware called {name!r}", needed, nearest(stem, known))
        hardware = cls.from_text(file.read_text(encoding="utf-8"), file.name)
        return hardware.with_world(int(counted["world"])) if counted and stem != name else hardware

    @classmethod
    def named(cls, name: str | Path) -> Hardware:
        """What a command line means by `name`: that file, or the shipped one (with `.toml` or without)."""
        path = Path(name)
        if path.exists() or len(path.parts) > 1:
            return cls.from_toml(path)
        return cls.shipped(path.stem if path.suffix == ".toml" else path.name)

    @staticmethod
    def shipped_names() -> list[str]:
        """Names that `shipped` knows, sorted."""
        return sorted(file.stem for file in SHIPPED.glob("*.toml"))
