"""What changed between two texts of a program, said once.

Regions are compared by name, a feed-forward that became an expert layer with the layer it was, and `forward`
block by block. Changes that are the same but for the layer's number are shown for the first layer and counted
for the others.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence

from .layout import ranges

_FUNCTION = re.compile(r"^def (\w+)\(")
_ALIAS = re.compile(r"^\w+(?: = \w+)+$")
_BLOCK = re.compile(r"^    # block (\d+) ·")
_ASSIGNED = re.compile(r"^ +([\w, ]+?) = ")
_NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?![\w(=])")  # no attribute, function or keyword
_NUMBER = re.compile(r"(?<=_)\d+(?=\()|(?<=\w\[)\d+(?=\])")  # of a layer: self.ffn_3(x), self.h[3].ln
_COMMENT = re.compile(r" +# .*$")
_CONTEXT = 2


def diff_text(before: str, after: str, before_name: str = "before", after_name: str = "after") -> str:
    """A readable, hierarchical diff of two texts made by `program_text`; '' when their code is the same.

    At the top one line per kind of region that appeared, vanished or changed; then the changes, repeated ones
    folded (`×11 alike`). Comments alone (shapes, sources) are no change.
    """
    old, new = functions_of(before), functions_of(after)
    pairs = _pairs(old, new)
    changed = [(a, b) for a, b in pairs if code_of(old.get(a, [])) != code_of(new.get(b, []))]
    if not changed:
        return ""
    head = [f"--- {before_name}", f"+++ {after_name}", *_summary(pairs, changed, old, new)]
    return "\n".join([*head, *_sections(changed, old, new)]) + "\n"


def functions_of(text: str) -> dict[str, list[str]]:
    """Name → lines of its body, for every function of a text; a region printed for several appears for each.

    The blocks of `forward` count as functions of their own: `block_3`, and `head` for what follows them.
    """
    functions: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        found = _FUNCTION.match(line)
        if found:
            body = functions.setdefault(found[1], [line.replace(f"def {found[1]}(", "def (", 1)])
        elif _ALIAS.match(line):
            *names, known = line.split(" = ")
            functions.update(dict.fromkeys(names, functions[known]))
        elif functions and (line.startswith(" ") or not line):
            body.append(line)
    return _with_blocks({name: _without_blank_ends(lines) for name, lines in functions.items()})


def _with_blocks(functions: dict[str, list[str]]) -> dict[str, list[str]]:
    forward = functions.pop("forward", [])
    parts: dict[str, list[str]] = {"forward": []}
    part, previous = "forward", ""
    for line in forward:
        found = _BLOCK.match(line)
        if found:
            part = f"block_{found[1]}"
        elif not previous and part.startswith("block"):
            part = "head"
        parts.setdefault(part, []).append(line)
        previous = line
    return functions | {name: _without_blank_ends(lines) for name, lines in parts.items()}


def _without_blank_ends(lines: list[str]) -> list[str]:
    return "\n".join(lines).rstrip("\n").split("\n")


def code_of(lines: Iterable[str]) -> list[str]:
    """The lines of code, without comments and empty lines."""
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
    pairs += [("", name) for name in came if name not in became.values()]
    places = {name: place for place, name in enumerate([*old, *new])}
    return sorted(pairs, key=lambda pair: places[pair[1] or pair[0]])


# the summary


def _summary(
    pairs: Sequence[tuple[str, str]],
    changed: Sequence[tuple[str, str]],
    old: dict[str, list[str]],
    new: dict[str, list[str]],
) -> list[str]:
    became = [(a, b) for a, b in pairs if a and b and a != b]
    groups = {
        "became": [(f"{kind_of(a)} → {kind_of(b)}", b) for a, b in became],
        "appeared": [(kind_of(b), b) for a, b in pairs if not a],
        "vanished": [(kind_of(a), a) for a, b in pairs if not b],
        "changed": [(kind_of(a), a) for a, b in changed if a == b],
        "unchanged": [(kind_of(a), a) for a, b in pairs if a == b and (a, b) not in changed],
    }
    lines = [f"# {verb}: {listed(members)}" for verb, members in groups.items() if members]
    return [*lines, f"# lines: {length_of(old)} → {length_of(new)}"]


def length_of(functions: dict[str, list[str]]) -> int:
    """Lines of code that a reader meets: alike functions count once."""
    return sum(len(code_of(lines)) for lines in set(map(tuple, functions.values())))


def listed(members: Sequence[tuple[str, str]]) -> str:
    """`ffn 0–3 (×4), moe_1`, of pairs (kind, name)."""
    grouped: dict[str, list[str]] = {}
    for kind, name in members:
        grouped.setdefault(kind, []).append(name)
    return ", ".join(_counted(kind, names) for kind, names in grouped.items())


def _counted(kind: str, names: list[str]) -> str:
    return f"{kind} {_layers(names)} (×{len(names)})" if len(names) > 1 else names[0]


def _layers(names: Sequence[str]) -> str:
    digits = (name.rpartition("_")[2] for name in names)
    return ranges([int(number) for number in digits if number.isdigit()])


def kind_of(name: str) -> str:
    """`ffn` of `ffn_3`."""
    base, _, number = name.rpartition("_")
    return base if number.isdigit() else name


# the changes


def _sections(
    changed: Sequence[tuple[str, str]], old: dict[str, list[str]], new: dict[str, list[str]]
) -> list[str]:
    """One section per distinct change of a region or a block."""
    variables = variables_of([*old.values(), *new.values()])
    sections: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    shown: dict[tuple[str, str], list[str]] = {}
    for a, b in changed:
        shown[a, b] = hunks(old.get(a, []), new.get(b, []))
        sections.setdefault(pattern(shown[a, b], variables), []).append((a, b))
    lines: list[str] = []
    for members in sections.values():
        lines += ["", f"@@ {_title(members)}", *shown[members[0]]]
    return lines


def _title(members: Sequence[tuple[str, str]]) -> str:
    a, b = members[0]
    title = f"{a} → {b}" if a and b and a != b else a or f"{b} is new"
    title += "" if b else " is gone"
    others = [b or a for a, b in members[1:]]
    return title + (f"   ×{len(members)} alike: {_layers([b or a, *others])}" if others else "")


def variables_of(functions: Iterable[Sequence[str]]) -> set[str]:
    """Names that some function assigns; which is which does not matter when changes are compared."""
    names: set[str] = set()
    for line in itertools.chain.from_iterable(functions):
        found = _ASSIGNED.match(line)
        names.update(found[1].split(", ") if found else ())
    return names - {"_"}


def pattern(lines: Sequence[str], variables: set[str]) -> tuple[str, ...]:
    """What alike changes share: code whose variables are counted off and whose layers are left out."""
    numbers: dict[str, str] = {}

    def counted(found: re.Match[str]) -> str:
        name = found.group()
        return numbers.setdefault(name, f"v{len(numbers)}") if name in variables else name

    code = (_COMMENT.sub("", line).rstrip() for line in lines if not line.lstrip("+- ").startswith("#"))
    return tuple(_NAME.sub(counted, _NUMBER.sub("#", line)) for line in code)


def hunks(old: list[str], new: list[str]) -> list[str]:
    """The changed stretches, with a little context; lines that differ only in comments are the same."""
    left, right = ([_COMMENT.sub("", line).rstrip() for line in lines] for lines in (old, new))
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    lines: list[str] = []
    for group in matcher.get_grouped_opcodes(_CONTEXT):
        lines += ["  …"] if lines else []
        lines += _unified(group, old, new)
    return lines


def _unified(
    group: Iterable[tuple[str, int, int, int, int]], old: list[str], new: list[str]
) -> Iterable[str]:
    for tag, i, j, k, m in group:
        if tag == "equal":
            yield from (f"  {line}" for line in new[k:m])
        else:
            yield from (f"- {line}" for line in old[i:j])
            yield from (f"+ {line}" for line in new[k:m])
