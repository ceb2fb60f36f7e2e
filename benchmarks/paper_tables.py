"""The tables of docs/paper.md, of the record that `paper_curves` writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.paper_models import SERVED
from benchmarks.paper_points import DEEPSPEED, PYTORCH

Record = dict[str, Any]
_WITHIN = 0.2  # what the paper's points are to be met by


def tables(record: Record) -> dict[str, str]:
    """Every table by the name of its marks."""
    return {
        "paper_served": served(record),
        "paper_latency": latency(record),
        "paper_headlines": headlines(record),
        "paper_memory": memory(record),
        "paper_training": training(record),
    }


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def served(record: Record) -> str:
    """Parameters of the served and the dense models."""
    head = ("model", "layers", "width", "experts", "tensor", "paper", "parameters")
    rows = []
    for name, found in record["totals"].items():
        model = SERVED[name]
        shape = (str(model.layers), f"{model.width:,}", str(model.experts or "–"), str(model.tensor))
        rows.append((name, *shape, model.total, f"{found:,} ({rounded(found, model.total)})"))
    return _table(head, rows)


def rounded(parameters: int, printed: str) -> str:
    """A total in the unit and with the decimals that the paper prints."""
    unit = {"M": 1e6, "B": 1e9, "T": 1e12}[printed[-1]]
    decimals = len(printed[:-1].partition(".")[2])
    return f"{parameters / unit:.{decimals}f}{printed[-1]}"


def latency(record: Record) -> str:
    """Every published point beside what is predicted."""
    times = ("published ms", "predicted ms", "", "host ms", "supposed ms", "moec ms")
    head = ("figure", "model", "GPUs", "system", *times)
    rows = []
    for found in record["points"].values():
        published = found["published"]
        error = f"{found['seconds'] / published - 1:+.0%}" if published else ""
        if published and abs(found["seconds"] / published - 1) > _WITHIN:
            error = f"**{error}**"
        where = (found["figure"], found["model"], str(found["ranks"]), found["system"])
        others = (_ms(found[name]) for name in ("host", "supposed", "moec"))
        rows.append((*where, _ms(published), _ms(found["seconds"]), error, *others))
    return _table(head, rows)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def headlines(record: Record) -> str:
    """What the paper says in one sentence each."""
    points = record["points"]
    rows = []
    for name, ranks, said in _FASTER:
        slow, fast = points[f"{name} · {PYTORCH} · 128"], points[f"{name} · {DEEPSPEED} · {ranks}"]
        rows.append(_ratio(f"{name}, DeepSpeed-MoE against PyTorch", said, slow, fast))
    trillion = points[f"24B+MoE-128 · {DEEPSPEED} · 256"]
    rows.append(("24B+MoE-128 (1T) on 256 GPUs", "< 25 ms", *_both(trillion, " ms"), ""))
    dense, small = points[f"6.7B · {PYTORCH} · 1"], points[f"1.3B+PR-MoE-128+MoS · {DEEPSPEED} · 128"]
    rows.append(_ratio("1.3B+PR-MoE+MoS against 6.7B dense, faster", 2.4, dense, small))
    large, student = points[f"175B · {PYTORCH} · 16"], points[f"35B+PR-MoE-128+MoS · {DEEPSPEED} · 256"]
    rows.append(_ratio("1.5T-class PR-MoE+MoS against 175B dense, faster", 4.5, large, student))
    rows.append(_ratio("the same, cheaper (tensor groups of 8, not 16)", 9.0, large, student, 2))
    return _table(("", "paper", "predicted", "supposed", ""), rows)


_FASTER = (
    ("2.4B+MoE-128", 128, 5.5),
    ("8B+MoE-128", 128, 5.9),
    ("24B+MoE-128", 256, 7.2),
    ("47B+MoE-128", 256, 7.3),
)


def _both(found: Record, unit: str) -> tuple[str, str]:
    return f"{_ms(found['seconds'])}{unit}", f"{_ms(found['supposed'])}{unit}"


def _ratio(what: str, said: float, slow: Record, fast: Record, times: int = 1) -> tuple[str, ...]:
    found = times * slow["seconds"] / fast["seconds"]
    other = times * slow["supposed"] / fast["supposed"]
    error = f"{found / said - 1:+.0%}"
    error = f"**{error}**" if abs(found / said - 1) > _WITHIN else error
    return what, f"{said:.1f}×", f"{found:.1f}×", f"{other:.1f}×", error


def memory(record: Record) -> str:
    """What a GPU holds of each variant of the 349B model."""
    rows = [
        (
            found["model"],
            str(found["ranks"]),
            f"{found['weights'] / 1e9:.1f} GB",
            f"{found['cache'] / 1e9:.1f} GB",
            "yes" if found["fits"] else "no",
        )
        for found in record["memory"].values()
    ]
    return _table(("model", "GPUs", "weights of a GPU", "keys and values", "fits 40 GB"), rows)


def training(record: Record) -> str:
    """Samples a second, and their ratio."""
    runs = record["training"]
    rows = [
        (
            name,
            f"{found['batch']:,}",
            f"{found['published']:.0f}",
            f"{found['samples']:.0f}",
            f"{found['flops'] / found['batch'] * 128 / 1e12:.1f}",
        )
        for name, found in runs.items()
    ]
    dense, sparse = (runs[name] for name in ("6.7B", "1.3B+MoE-128"))
    ratio = sparse["samples"] / dense["samples"]
    said = sparse["published"] / dense["published"]
    work = (dense["flops"] / dense["batch"]) / (sparse["flops"] / sparse["batch"])
    rows.append(("sparse against dense", "", f"{said:.1f}×", f"{ratio:.1f}×", f"{work:.1f}× less"))
    head = ("model", "batch", "published samples/s", "predicted samples/s", "TFLOP a sample")
    return _table(head, rows)
