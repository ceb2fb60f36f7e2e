"""A student beside its teacher: which block became which, and what else is different.

Layers are paired by where their weights come from, not by their numbers: layers that only moved are told in
one line, layers that are gone are shown as gone, and a layer that does something else is shown in full.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from .diff import code_of, functions_of, hunks, kind_of, length_of, listed, pattern, variables_of
from .origins import Origins

_CALLED = re.compile(r"self\.([a-z]+_\d+)\(")
_PATH = re.compile(r"^    # block (\d+) · (\S+)")

Functions = Mapping[str, list[str]]


def student_diff(teacher: str, student: str, origins: Origins, name: str) -> str:
    """What is different between the text of a teacher and that of its student; '' when nothing is.

    `origins`: the student's, which tell what each weight was called in the teacher. `name`: of the student's
    stage. Layers without weights of their own, or without a number in the user's names, are paired by number.
    """
    old, new = functions_of(teacher), functions_of(student)
    moved = _moved(old, new, origins)
    pairs = [(moved.get(b, b if b in old and not _numbered(b) else ""), b) for b in new]
    gone = [a for a in old if a not in {a for a, _ in pairs}]
    words = variables_of([*old.values(), *new.values()])
    changed = [(a, b) for a, b in pairs if a and _differ(old[a], new[b], words)]
    renamed = [(a, b) for a, b in pairs if a and a != b]
    added = [b for a, b in pairs if not a]
    if not (gone or renamed or changed or added):
        return ""
    head = ["--- teacher", f"+++ {name}"]
    head += [f"# {verb}: {listed([(kind_of(n), n) for n in names])}" for verb, names in [
        ("dropped", gone), ("new", added), ("changed", [b for _, b in changed])] if names]  # fmt: skip
    head += [f"# the same, moved: {_moves(renamed)}"] if renamed else []
    head += [f"# lines: {length_of(old)} → {length_of(new)}"]
    sections = [*_gone(gone, old, new, words), *_changed(changed, old, new)]
    sections += [line for b in added for line in ("", f"@@ {b} is new", *hunks([], new[b]))]
    return "\n".join([*head, *sections]) + "\n"


def _moved(old: Functions, new: Functions, origins: Origins) -> dict[str, str]:
    """Function of the student → the teacher's that it was: blocks, and the regions they call, in order."""
    teachers = {path: block for block, path in _paths(old).items()}
    found: dict[str, str] = {}
    for block, path in _paths(new).items():
        was = teachers.get(_teachers_path(path, origins) or path)
        if was is None:
            continue
        found[block] = was
        for b, a in zip(_called(new[block]), _called(old[was]), strict=False):
            found.setdefault(b, a)
    return found


def _paths(functions: Functions) -> dict[str, str]:
    """`block_3` → `transformer.h.3`."""
    matches = {name: _PATH.match(lines[0]) for name, lines in functions.items() if lines}
    return {name: match[2] for name, match in matches.items() if match}


def _teachers_path(path: str, origins: Origins) -> str | None:
    depth = path.count(".") + 1
    for origin in origins.values():
        if origin.how == "same" and origin.source and origin.source.startswith(f"{path}."):
            return ".".join(origin.teacher.split(".")[:depth])
    return None


def _called(lines: Sequence[str]) -> list[str]:
    return _CALLED.findall("\n".join(lines))


def _numbered(name: str) -> bool:
    return name.rpartition("_")[2].isdigit()


def _differ(old: list[str], new: list[str], words: set[str]) -> bool:
    """Whether they say more than other layers' numbers."""
    return pattern(code_of(old), words) != pattern(code_of(new), words)


def _moves(renamed: Sequence[tuple[str, str]]) -> str:
    """`block 3–11 → 2–10, ffn 3–11 → 2–10`, one piece for each stretch that moved alike."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for a, b in renamed:
        kinds.setdefault(kind_of(a), []).append((_number(a), _number(b)))
    return ", ".join(f"{kind} {stretch}" for kind, moves in kinds.items() for stretch in _stretches(moves))


def _stretches(moves: list[tuple[int, int]]) -> list[str]:
    starts = [0, *(i + 1 for i, (m, n) in enumerate(pairwise(moves)) if m[0] - m[1] != n[0] - n[1])]
    found = []
    for i, j in pairwise([*starts, len(moves)]):
        (a, b), (c, d) = moves[i], moves[j - 1]
        found.append(f"{a} → {b}" if a == c else f"{a}–{c} → {b}–{d}")
    return found


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _gone(gone: Sequence[str], old: Functions, new: Functions, words: set[str]) -> list[str]:
    """What is gone, alike ones once; a function that others still are the same as is not shown."""
    left = {pattern(code_of(lines), words) for lines in new.values()}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in gone:
        key = pattern(code_of(old[name]), words)
        if name.startswith("block_") or key not in left:
            groups.setdefault(key, []).append(name)
    lines: list[str] = []
    for names in groups.values():
        others = f"   ×{len(names)} alike: {', '.join(str(_number(n)) for n in names)}"
        title = f"{names[0]} is gone" + (others if len(names) > 1 else "")
        lines += ["", f"@@ {title}", *(f"- {line}" for line in old[names[0]])]
    return lines


def _changed(changed: Sequence[tuple[str, str]], old: Functions, new: Functions) -> list[str]:
    lines: list[str] = []
    for a, b in changed:
        title = a if a == b else f"{a} → {b}"
        lines += ["", f"@@ {title}", *hunks(old[a], new[b])]
    return lines
