"""Hardware: what a device can do, what links carry, how many of each there are. A TOML file, or measured.

Hardware.from_toml("a100x256.toml");  Hardware.shipped("a100x256")
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from moec.errors import PlanError
from moec.plan.section import Section, Source, plan_error
from moec.plan.source import locate, parse, read

from .measured import Measured

SHIPPED = Path(__file__).parent / "shipped"


class Device(Section):
    """One accelerator, or the cores that one rank has."""

    name: str = Field(description="What it is called.")
    memory: float = Field(gt=0, description="Bytes that fit.")
    bandwidth: float = Field(gt=0, description="Bytes a second between the chip and its memory.")
    launch: float = Field(ge=0, description="Seconds that it takes to start one kernel.")
    peak: dict[str, float] = Field(description="Dtype → floating point operations a second.")
    measured: Measured | None = Field(default=None, description="Times of operators, of `moec calibrate`.")


class Link(Section):
    """What connects two devices: seconds of one message are latency + bytes / bandwidth."""

    latency: float = Field(ge=0, description="Seconds until the first byte arrives.")
    bandwidth: float = Field(gt=0, description="Bytes a second that one device sends.")


class Hardware(Section):
    """A machine or a cluster of equal ones."""

    device: Device = Field(description="Every device is one of these.")
    inside: Link = Field(description="Between devices of one node.")
    between: Link | None = Field(default=None, description="Between nodes; left out: there is one node.")
    per_node: int = Field(default=1, ge=1, description="Devices of a node.")
    nodes: int = Field(default=1, ge=1, description="Nodes.")

    @property
    def world(self) -> int:
        """All devices."""
        return self.nodes * self.per_node

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
        """One of those that come with moec; `shipped_names()` lists them."""
        file = SHIPPED / f"{name}.toml"
        if not file.exists():
            raise PlanError("hardware", f"no hardware called {name!r}", ", ".join(cls.shipped_names()))
        return cls.from_text(file.read_text(), file.name)

    @staticmethod
    def shipped_names() -> list[str]:
        """Names that `shipped` knows, sorted."""
        return sorted(file.stem for file in SHIPPED.glob("*.toml"))
