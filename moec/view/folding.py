"""Blocks that are alike, said once: sections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moec.view.drawings import Drawings
from moec.view.pairing import Union
from moec.view.stills import Frame, Still
from moec.view.timeline import Section


def sections_of(
    unions: Sequence[Union], before: Frame | None, after: Frame, drawings: Drawings
) -> tuple[Section, ...]:
    """One section for each kind of block, in the order in which the first of each runs."""
    members: dict[int, list[Union]] = {}
    for union in unions:
        members.setdefault(drawings.place(union, before, after), []).append(union)
    twice = _numbered_twice(unions)
    return tuple(_section(place, alike, twice) for place, alike in members.items())


def _section(place: int, alike: Sequence[Union], twice: bool) -> Section:
    shown = [_shown(union) for union in alike]
    layers = tuple(still.layer for still in shown if still.layer is not None)
    olds = tuple(union.before.layer for union in alike if union.before and union.before.layer is not None)
    renumbered = len(olds) == len(layers) and olds != layers
    title = f"block{'s' if len(layers) > 1 else ''} {runs(layers)}" if layers else shown[0].title
    title += f" · {shown[0].key.partition(' · ')[2].rpartition('.')[0]}" if twice and layers else ""
    if renumbered:
        title += f", {'were' if len(layers) > 1 else 'was'} {runs(olds)}"
    elif layers and alike[0].after is None:
        title += ", left out"
    return Section(title, layers, place, alike[0].changed, olds if renumbered else ())


def _shown(union: Union) -> Still:
    still = union.after or union.before
    assert still is not None
    return still


def _numbered_twice(unions: Sequence[Union]) -> bool:
    """Whether two blocks have one number, as those of an encoder and a decoder."""
    counted = Counter(_shown(union).layer for union in unions if union.after is not None)
    return any(count > 1 for layer, count in counted.items() if layer is not None)


def runs(numbers: Sequence[int]) -> str:
    """`0–10, 12–22`, `1, 3 … 57, 59`: layer numbers, runs of one stride of 1 or 2 drawn together."""
    parts: list[str] = []
    rest = list(numbers)
    while rest:
        length = max(_run(rest, 1), _run(rest, 2))
        stride = rest[1] - rest[0] if length > 2 else 1
        found, rest = rest[: length if length > 2 else 1], rest[length if length > 2 else 1 :]
        if len(found) == 1:
            parts.append(str(found[0]))
        else:
            parts.append(
                f"{found[0]}–{found[-1]}" if stride == 1 else f"{found[0]}, {found[1]} … {found[-1]}"
            )
    return ", ".join(parts)


def _run(numbers: Sequence[int], stride: int) -> int:
    """How many of the first numbers follow each other by `stride`."""
    length = 1
    while length < len(numbers) and numbers[length] - numbers[length - 1] == stride:
        length += 1
    return length


def differing(sections: Sequence[Section]) -> str:
    """`×22 alike, 2 differ: 3, 7`, of all numbered blocks of a step; '' where there are not two."""
    numbered = [section for section in sections if section.layers]
    if sum(len(section.layers) for section in numbered) < 2:
        return ""
    most = max(numbered, key=lambda section: len(section.layers))
    others = sorted(layer for section in numbered if section is not most for layer in section.layers)
    if len(most.layers) == 1:
        return f"{len(numbered)} blocks, no two alike"
    alike = f"×{len(most.layers)} alike"
    return f"{alike}, {len(others)} differ: {runs(others)}" if others else alike
