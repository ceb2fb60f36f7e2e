"""What one device can do: peaks, memory, what it costs to start anything, and which shares are reached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from moec.cost.machine.measured import Direction, Measured
from moec.cost.machine.roofline import roofline_seconds
from moec.errors import PlanError, nearest
from moec.plan.section import Section, complaint

if TYPE_CHECKING:
    from moec.cost.operation import Operation
    from moec.runtime.ops.work import Work

Size = Annotated[int, Field(ge=1)]
DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
MEASURED_DTYPES = ("float32", "int64", "bool")
"""What `moec calibrate` measures; others go by the roofline."""


class Device(Section):
    """One accelerator, or the cores that one rank has."""

    name: str = Field(description="What it is called.")
    memory: float = Field(gt=0, description="Bytes that fit.")
    bandwidth: float = Field(gt=0, description="Bytes a second between the chip and its memory.")
    launch: float = Field(
        ge=0,
        description="Seconds of the device for one kernel beside its work: its start and its end.",
    )
    peak: dict[str, float] = Field(description="Dtype → floating point operations a second.")
    host: float = Field(
        default=0.0, ge=0, description="Seconds of the host for one operator that it starts eagerly."
    )
    units: int = Field(default=1, ge=1, description="Processors that one kernel is dealt out to (SMs).")
    tiles: tuple[tuple[Size, Size], ...] = Field(
        default=(), description="Tiles of a matrix product that one unit computes; left out: any size."
    )
    cache: float = Field(default=0.0, ge=0, description="Bytes of the cache that all units share.")
    cache_bandwidth: float | None = Field(
        default=None, gt=0, description="Bytes a second between all units and that cache."
    )
    product_share: float = Field(
        default=1.0, gt=0, le=1, description="Share of the peak that a large matrix product reaches."
    )
    memory_share: float = Field(
        default=1.0, gt=0, le=1, description="Share of the bandwidth that a long stream reaches."
    )
    measured: Measured | None = Field(default=None, description="Times of operators that were measured.")

    @field_validator("tiles", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        return tuple(tuple(tile) if isinstance(tile, list) else tile for tile in given)

    @field_validator("peak")
    @classmethod
    def _known(cls, peak: dict[str, float]) -> dict[str, float]:
        for dtype, speed in peak.items():
            if dtype not in DTYPES:
                raise complaint(
                    f"unknown dtype '{dtype}'", f"one of {', '.join(DTYPES)}", nearest(dtype, DTYPES)
                )
            if speed <= 0:
                raise complaint(f"{dtype} = {speed:g}", "more than 0", at=(dtype,))
        if not peak:
            raise complaint("no dtype", "one or more: peak = { float32 = 19.5e12 }")
        return peak

    def peak_of(self, dtype: str) -> float:
        """Operations a second in `dtype`; `PlanError` where the file does not say."""
        if dtype not in self.peak:
            known = ", ".join(self.peak)
            needed = f"device.peak with a number for {dtype} (it has {known})"
            raise PlanError(self.name, f"a matrix product in {dtype}", needed, nearest(dtype, self.peak))
        return self.peak[dtype]

    def knows(self, operation: Operation, direction: Direction) -> bool:
        """Whether times of this operation were measured here."""
        if self.measured is None or operation.dtype not in MEASURED_DTYPES:
            return False
        return self.measured.knows(operation.operator, direction)

    def seconds(
        self, work: Work, operation: Operation, direction: Direction, working: float = float("inf")
    ) -> float:
        """Seconds on the device of one run of `operation`, whose amounts in `work` are numbers.

        Measured ones where they are known, else the roofline. `working`: bytes that the program touches in
        turn, which says how much of its operands the caches still hold. A view has no calls, and takes what
        was measured of it or nothing.
        """
        if self.measured is not None and self.knows(operation, direction):
            far = self.measured.far_share(working)
            return self.measured.seconds(work, operation.operator, direction, far)
        if not work.calls:
            return 0.0
        return roofline_seconds(self, work, operation, direction)
