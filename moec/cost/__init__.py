"""Cost: what a program spends, read off its graph as expressions, and how long that takes on hardware."""

from moec.cost.cost import Cost
from moec.cost.machine.device import Device
from moec.cost.machine.hardware import Hardware
from moec.cost.machine.link import Link, Way
from moec.cost.operation import Operation, Sending
from moec.cost.rank.memory import Memory
from moec.cost.reading.read import read_operations
from moec.cost.reading.routing import Routing
from moec.cost.symbols import meaning, symbol
from moec.cost.timing.generation import Generation, predict_generation
from moec.cost.timing.predict import Prediction, predict

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
