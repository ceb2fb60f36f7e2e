"""Traffic as a table: what was counted, beside what the graph says."""

from __future__ import annotations

from rich.table import Table

from moec.runtime.ops.sent import Kind, Sent, Traffic


def traffic_table(counted: Traffic, predicted: Traffic | None = None, title: str = "") -> Table:
    """A row for each direction, axis and operator, and one for all.

    `predicted`: what the graph says of the same run; what it says nothing of (the reduction of gradients,
    say) has a dash there, and what differs is marked.
    """
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for name in ("axis", "operator", "direction"):
        table.add_column(name)
    for name in ("calls", "messages", "bytes", *(["by the graph"] if predicted is not None else [])):
        table.add_column(name, justify="right")
    kinds = set(counted.sent) | (set(predicted.sent) if predicted is not None else set())
    for kind in sorted(kinds, key=lambda kind: (kind.axis, kind.operator, kind.direction)):
        sent = counted.sent.get(kind, Sent())
        table.add_row(
            kind.axis, kind.operator, kind.direction, *_numbers(sent), *_beside(kind, sent, predicted)
        )
    both = [f"{predicted.total.bytes:,}"] if predicted is not None else []
    table.add_row("all", "", "", *_numbers(counted.total), *both)
    return table


def _numbers(sent: Sent) -> list[str]:
    return [f"{number:,}" for number in (sent.calls, sent.messages, sent.bytes)]


def _beside(kind: Kind, sent: Sent, predicted: Traffic | None) -> list[str]:
    """The bytes by the graph, for a table that has them."""
    if predicted is None:
        return []
    if kind not in predicted.sent:
        return ["–"]
    other = predicted.sent[kind]
    if other == sent:
        return [f"{other.bytes:,}"]
    return [f"{other.bytes:,} in {other.messages:,} messages: differs"]
