"""What changed between two texts of a program, said once.

Regions are compared by name, a feed-forward that became an expert layer with the layer it was. Changes that are
the same but for the layer's number are shown for the first layer and counted for the others.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_FUNCTION = re.compile(r"^def (\w+)\(")
_ALIAS = re.compile(r"^\w+(?: = \w+)+$")
_NUMBERED = re.compile(r"(?<=_)\d+\b|(?<=\[)\d+(?=\])|(?<=\.)\d+(?=\.|\b)|(?<=block )\d+")
_COMMENT = re.compile(r" +# .*$")
_CONTEXT = 2


@dataclass(frozen=True)
class Hunk:
    """Lines of a unified diff, and the same with layer numbers and shapes out of the way, for comparison."""

    lines: tuple[str, ...]

    @property
    def pattern(self) -> tuple[str, ...]:
        """What alike hunks share: the lines, with every number of a layer or a copy replaced."""
        numbers: dict[str, str] = {}
        return tuple(
            _NUMBERED.sub(lambda m: numbers.setdefault(m.group(), f"#{len(numbers)}"), _COMMENT.sub("", line))
            for line in self.lines
        )


def diff_text(before: str, after: str, before_name: str = "before", after_name: str = "after") -> str:
    """A readable, hierarchical diff of two texts made by `program_text`; '' when their code is the same.

    At the top one line per kind of region that appeared, vanished or changed; then the changes, repeated ones
    folded (`×11 alike`). Comments alone (shapes, sources) are no change.
    """
    old, new = functions_of(before), functions_of(after)
    pairs = _pairs(old, new)
    changed = [(a, b) for a, b in pairs if _code(old.get(a, [])) != _code(new.get(b, []))]
    if not changed:
        return ""
    head = [f"--- {before_name}", f"+++ {after_name}", *_summary(pairs, changed, old, new)]
    return "\n".join([*head, *_sections(changed, old, new)]) + "\n"


def functions_of(text: str) -> dict[str, list[str]]:
    """Name → lines of its body, for every function of a text; a region printed for several appears for each."""
    functions: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        found = _FUNCTION.match(line)
        if found:
            body = functions.setdefault(found[1], [line.replace(f"def {found[1]}(", "def (", 1)])
        elif line.startswith((" ", ")")) or not line:
            body.append(line) if functions else None
        elif _ALIAS.match(line):
            *names, known = line.split(" = ")
            functions.update(dict.fromkeys(names, functions[known]))
            body = []
        else:
            body = []
    return {name: _without_blank_ends(lines) for name, lines in functions.items()}


def _without_blank_ends(lines: list[str]) -> list[str]:
    return "\n".join(lines).rstrip("\n").split("\n")


def _code(lines: Iterable[str]) -> list[str]:
    stripped = (_COMMENT.sub("", line).rstrip() for line in lines)
    return [line for line in stripped if line and not line.lstrip().startswith("#")]


def _pairs(old: dict[str, list[str]], new: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Which function became which: the same name, or else the same layer; '' on the side that has none."""
    gone = {name: name.rpartition("_")[2] for name in old if name not in new}
    came = {name: name.rpartition("_")[2] for name in new if name not in old}
    became: dict[str, str] = {}
    for name, layer in gone.items():
        match = next((n for n, number in came.items() if number == layer and n not in became.values()), "")
        if layer.isdigit() and match:
            became[name] = match
    pairs = [(name, name if name in new else became.get(name, "")) for name in old]
    return sorted(pairs + [("", n) for n in came if n not in became.values()], key=lambda p: "forward" in p)


# the summary


def _summary(
    pairs: Sequence[tuple[str, str]],
    changed: Sequence[tuple[str, str]],
    old: dict[str, list[str]],
    new: dict[str, list[str]],
) -> list[str]:
    became = [(a, b) for a, b in pairs if a and b and a != b]
    groups = {
        "became": [(f"{_kind(a)} → {_kind(b)}", b) for a, b in became],
        "appeared": [(_kind(b), b) for a, b in pairs if not a],
        "vanished": [(_kind(a), a) for a, b in pairs if not b],
        "changed": [(_kind(a), a) for a, b in changed if a == b],
        "unchanged": [(_kind(a), a) for a, b in pairs if a == b and (a, b) not in changed],
    }
    lines = [f"# {verb}: {_listed(members)}" for verb, members in groups.items() if members]
    return [*lines, f"# lines: {_length(old)} → {_length(new)}"]


def _length(functions: dict[str, list[str]]) -> int:
    """Lines of code that a reader meets: alike functions count once."""
    return sum(len(_code(lines)) for lines in {id(lines): lines for lines in functions.values()}.values())


def _listed(members: Sequence[tuple[str, str]]) -> str:
    grouped: dict[str, list[str]] = {}
    for kind, name in members:
        grouped.setdefault(kind, []).append(name)
    return ", ".join(_counted(kind, names) for kind, names in grouped.items())


def _counted(kind: str, names: list[str]) -> str:
    if kind == names[0]:
        return kind
    return f"{kind} ×{len(names)} (layers {ranges(names)})"


def ranges(names: Sequence[str]) -> str:
    """`1, 3, 5 … 11` for the layer numbers at the end of `names`: runs of one stride are drawn together."""
    numbers = [int(digits) for digits in (name.rpartition("_")[2] for name in names) if digits.isdigit()]
    if len(numbers) < 4:
        return ", ".join(map(str, numbers))
    strides = {b - a for a, b in itertools.pairwise(numbers)}
    if len(strides) > 1:
        return ", ".join(map(str, numbers))
    return f"{numbers[0]}, {numbers[1]} … {numbers[-1]}"


def _kind(name: str) -> str:
    base, _, number = name.rpartition("_")
    return base if number.isdigit() else name


# the changes


def _sections(
    changed: Sequence[tuple[str, str]], old: dict[str, list[str]], new: dict[str, list[str]]
) -> list[str]:
    """One section per distinct change of a region, then the hunks of `forward`."""
    sections: dict[tuple[tuple[str, ...], ...], list[tuple[str, str]]] = {}
    hunks: dict[tuple[str, str], list[Hunk]] = {}
    for a, b in changed:
        hunks[a, b] = _hunks(old.get(a, []), new.get(b, []))
        sections.setdefault(tuple(hunk.pattern for hunk in hunks[a, b]), []).append((a, b))
    lines: list[str] = []
    for members in sections.values():
        lines += ["", f"@@ {_title(members)}", *_folded(hunks[members[0]])]
    return lines


def _title(members: Sequence[tuple[str, str]]) -> str:
    a, b = members[0]
    title = a if a == b else f"{a or 'nothing'} → {b or 'nothing'}"
    others = [b or a for a, b in members[1:]]
    return title + (f"   ×{len(members)} alike: {ranges([b or a, *others])}" if others else "")


def _hunks(old: list[str], new: list[str]) -> list[Hunk]:
    """The changed stretches, with a little context; lines that differ only in comments are the same."""
    left, right = ([_COMMENT.sub("", line).rstrip() for line in lines] for lines in (old, new))
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    return [Hunk(tuple(_unified(group, old, new))) for group in matcher.get_grouped_opcodes(_CONTEXT)]


def _unified(
    group: Iterable[tuple[str, int, int, int, int]], old: list[str], new: list[str]
) -> Iterable[str]:
    for tag, i, j, k, m in group:
        if tag == "equal":
            yield from (f"  {line}" for line in new[k:m])
        else:
            yield from (f"- {line}" for line in old[i:j])
            yield from (f"+ {line}" for line in new[k:m])


def _folded(hunks: Sequence[Hunk]) -> list[str]:
    """Hunks in order, each pattern shown at its first place and counted there."""
    patterns = [hunk.pattern for hunk in hunks]
    lines: list[str] = []
    for position, hunk in enumerate(hunks):
        count = patterns.count(hunk.pattern)
        if hunk.pattern in patterns[:position]:
            continue
        lines += ["  …"] if lines else []
        lines += hunk.lines
        lines += [f"  … and ×{count - 1} more alike"] if count > 1 else []
    return lines
