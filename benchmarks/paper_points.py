"""What the DeepSpeed-MoE paper measured, and what is predicted of the same: one point of a curve at a time.

The paper prints charts without numbers. Those of Figures 10, 11 and 14 stand as vectors in slides of the same
authors (SC22 and ICML 2022, in docs/assets/files of the DeepSpeed repository), where the height of a bar can
be read off to half a percent of the axis, and again off the throughput. That a tensor group has 8 sequences
follows from latency times throughput. How long the texts were is not said; here they have 256 positions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from benchmarks.paper_baseline import baseline_cost
from benchmarks.paper_deepspeed import deepspeed_cost
from benchmarks.paper_models import SERVED, Place, Served, decode_cost
from moec.cost import Cost, Hardware, Prediction, predict

ROWS, POSITIONS = 8, 256
PYTORCH, DEEPSPEED, MOEC = "PyTorch", "DeepSpeed-MoE", "moec"

# The host of an A100 machine of Azure, as the paper had them, is known from others: metaseq decodes OPT-175B
# eagerly on eight A100 in 95 ms a token, in 66 with one CUDA graph (facebookresearch/metaseq, pull 270).
EAGER_175B = 95e-3


@dataclass(frozen=True)
class Point:
    """One bar of a figure: `system` serves `model` on `ranks` GPUs in `published` seconds a token."""

    figure: str
    model: Served
    system: str
    ranks: int
    published: float | None = None


def _ms(milliseconds: float) -> float:
    return milliseconds * 1e-3


_52B, _DENSE = SERVED["1.3B+MoE-128"], SERVED["6.7B"]
_LARGE = SERVED["35B+MoE-128"]
_SCALING = {8: (56.5, 27.3), 16: (49.9, 19.2), 32: (46.5, 14.7), 64: (44.0, 12.8)}
_SIZES = (
    ("2.4B+MoE-128", 128, 57.6, 10.5),
    ("8B+MoE-128", 128, 138.9, 23.5),
    ("24B+MoE-128", 256, 174.0, 24.2),
    ("47B+MoE-128", 256, 332.4, 45.5),
)
POINTS = (
    *(Point("10", _52B, PYTORCH, ranks, _ms(both[0])) for ranks, both in _SCALING.items()),
    *(Point("10", _52B, DEEPSPEED, ranks, _ms(both[1])) for ranks, both in _SCALING.items()),
    *(Point("11", SERVED[name], PYTORCH, 128, _ms(slow)) for name, _, slow, _ in _SIZES),
    *(Point("11", SERVED[name], DEEPSPEED, ranks, _ms(fast)) for name, ranks, _, fast in _SIZES),
    Point("14", _DENSE, PYTORCH, 1, _ms(27.8)),
    Point("14", _52B, PYTORCH, 128, _ms(55.3)),
    Point("14", _52B, DEEPSPEED, 128, _ms(12.4)),
    Point("14", _52B.pyramid().student(), DEEPSPEED, 128, _ms(11.4)),
    Point("15", SERVED["175B"], PYTORCH, 16),
    Point("15", _LARGE.pyramid().student(), DEEPSPEED, 256),
)


@dataclass(frozen=True)
class Found:
    """What is predicted of a point: `seconds`; `by` kind of work, `host` what the host takes to start it all;
    `supposed`: seconds on the hardware that `supposed` gives; `moec`: seconds of moec's own decoder on the
    same ranks, recorded once (None for the baseline)."""

    point: Point
    seconds: float
    by: dict[str, float]
    host: float
    supposed: float
    moec: float | None = None

    @property
    def error(self) -> float | None:
        """Predicted against published: -0.1 is ten percent too fast."""
        return self.seconds / self.point.published - 1 if self.point.published else None


@functools.cache
def host_seconds() -> float:
    """Of the paper's machine, for one eager operator: see `EAGER_175B`. The graph is of another library, so
    this is what an operator of ours would have to take for a step of ours to take as long."""
    eight = Served("175B", 96, 12288, 96, experts=0, tensor=8)
    return EAGER_175B / starts(baseline_cost(eight, Place(8), 1, 2048))


def starts(cost: Cost) -> float:
    """Operators that the host of a baseline starts; a view is one too."""
    return float(sum(max(one.forward.calls, 1) for one in cost.operations))


def cluster(ranks: int) -> Hardware:
    """So many of the paper's GPUs: the shipped `a100`, with the host of the paper's machine."""
    hardware = Hardware.shipped(f"a100x{ranks}")
    device = hardware.device.model_copy(update={"host": host_seconds()})
    return hardware.model_copy(update={"device": device})


def supposed(system: str, hardware: Hardware) -> Hardware:
    """What would have to be otherwise for the points that are missed; no prediction uses it.

    For PyTorch: the GPUs of a node share one network card, and messages of an exchange go one after another.
    For DeepSpeed-MoE: weights are read at 5/9 of the bandwidth, as its authors reckon with (500 of 900 GB/s
    where tensor groups share a layer: slides of SC22, "Primary Challenge with MoE Inference").
    """
    if system == PYTORCH:
        ways = [way.model_copy(update={"parallel": 1}) for way in hardware.ways]
        return hardware.model_copy(update={"cards": 1, "ways": tuple(ways)})
    device = hardware.device.model_copy(update={"memory_share": 5 / 9})
    return hardware.model_copy(update={"device": device})


@functools.cache
def decoder_of(model: Served, ranks: int) -> Cost:
    """moec's decoder of a model on `ranks` ranks, with the exchange that the paper has there."""
    exchange = "coordinated" if model.tensor > 1 else "hierarchical" if ranks > 8 else "flat"
    return decode_cost(model, Place.of(model, ranks, exchange))


def found_of(point: Point) -> Found:
    """Predict one point."""
    if point.system == PYTORCH:
        cost = baseline_cost(point.model, Place.of(point.model, point.ranks), ROWS, POSITIONS)
        return _found(point, cost, None)
    decoder = decoder_of(point.model, point.ranks)
    own = step(decoder, cluster(point.ranks), captured=True).seconds
    return _found(point, deepspeed_cost(point.model, decoder, ROWS), own)


def step(cost: Cost, hardware: Hardware, *, captured: bool = False) -> Prediction:
    """One token of every row."""
    return predict(cost, hardware, captured=captured, B=ROWS, n=1, m=1, L=POSITIONS)


def _found(point: Point, cost: Cost, own: float | None) -> Found:
    hardware = cluster(point.ranks)
    prediction, other = step(cost, hardware), step(cost, supposed(point.system, hardware))
    host = starts(cost) * host_seconds()
    return Found(point, prediction.seconds, prediction.by("kind"), host, other.seconds, own)
