"""Cost: what a program spends, read off its graph as expressions, and how long that takes on hardware."""

from .cost import Cost
from .device import Device
from .hardware import Hardware
from .link import Link, Way
from .operation import Operation, Sending
from .predict import Prediction, predict
from .read import read_operations
from .symbols import meaning, symbol

__all__ = [
    "Cost",
    "Device",
    "Hardware",
    "Link",
    "Operation",
    "Prediction",
    "Sending",
    "Way",
    "meaning",
    "predict",
    "read_operations",
    "symbol",
]
