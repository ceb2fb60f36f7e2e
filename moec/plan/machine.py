"""`[parallel]` and `[compile]`: how a program is spread over ranks; how it is captured, checked and run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moec.plan.fields import AllToAll, AutoCount, CaptureDtype, Count, Positive
from moec.plan.section import Section


class Parallel(Section):
    """The `[parallel]` table: sizes of the mesh axes. data × tensor fill the world; experts split it anew."""

    data: AutoCount = Field(
        default="auto",
        description="Ranks that hold the dense part and see other tokens; auto: all that are left.",
    )
    tensor: Count = Field(default=1, description="Ranks that share one dense layer.")
    expert: Count = Field(
        default=1,
        description="Most ranks that one layer's experts spread over; a layer with fewer experts "
        "uses as many ranks as it has experts.",
    )
    slice: Count = Field(default=1, description="Ranks that share one expert.")
    all_to_all: AllToAll = Field(
        default="auto",
        description="How tokens travel to their experts: in one exchange (flat), first inside the node and "
        "then between nodes (hierarchical), each tensor rank its share of the tokens (coordinated), or as "
        "the mesh suggests (auto): shares when tensor is above 1, two steps when experts span nodes.",
    )
    node: Count = Field(
        default=8, description="Ranks on one machine: neighbours, between which rows travel fast."
    )
    timeout: Positive = Field(
        default=600.0,
        description="Seconds without progress after which a job ends, naming the rank that the others wait "
        "for; longer than the longest pause between two exchanges, such as the writing of a checkpoint.",
    )


class Compile(Section):
    """The `[compile]` table: how a program is captured, checked and run."""

    dtype: CaptureDtype = Field(default="auto", description="Dtype to capture in; auto: the model's own.")
    backend: Literal["eager", "fused", "inductor"] = Field(
        default="eager",
        description="What runs the program: the graph as it reads (eager), the same with larger operators "
        "(fused), or what torch.compile makes of it (inductor).",
    )
    verify: Literal["auto", "off", "full"] = Field(
        default="auto",
        description="Prove each rewrite on values and gradients: always (full), never (off), or when the "
        "model is small enough for it to take seconds (auto).",
    )
