"""Cost: what a program spends, read off its graph as expressions, and how long that takes on hardware."""

from .cost import Cost
from .device import Device
from .generation import Generation, predict_generation
from .hardware import Hardware
from .link import Link, Way
from .memory import Memory
from .operation import Operation, Sending
from .predict import Prediction, predict
from .read import read_operations
from .routing import Routing
from .symbols import meaning, symbol

__all__ = [
    "Cost",
    "Device",
    "Generation",
    "Hardware",
    "Link",
    "Memory",
    "Operation",
    "Prediction",
    "Routing",
    "Sending",
    "Way",
    "meaning",
    "predict",
    "predict_generation",
    "read_operations",
    "symbol",
]
