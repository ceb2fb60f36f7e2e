"""The plan: what is to become of a dense model.

`Plan` is the whole; `Layers` selects feed-forwards; `LayerSettings` is what one sparse layer is made of.
"""

from __future__ import annotations

from moec.plan.layers import Layers
from moec.plan.machine import Compile, Parallel
from moec.plan.moe import LayerSettings, Moe, Override
from moec.plan.schema import Plan
from moec.plan.training import Distill, Student, Train

__all__ = [
    "Compile",
    "Distill",
    "LayerSettings",
    "Layers",
    "Moe",
    "Override",
    "Parallel",
    "Plan",
    "Student",
    "Train",
]
