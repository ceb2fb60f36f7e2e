"""Whether a checkpoint is of the run that is to go on: by what has to be the same for that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.errors import ArtifactError

#: What a run has only where somebody teaches it; checkpoints of other runs do not speak of it.
TAUGHT = ("teacher", "distill")


def require_same_run(where: str, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise `ArtifactError`, naming what differs, unless the record `saved` is of a run like `mine`.

    A run may move to another mesh, where the fingerprint of the program is another too.
    """
    moved = saved.get("mesh") != mine.get("mesh")
    _require_same_kind(where, saved, mine)
    for name, value in mine.items():
        found = saved.get(name, value)
        if found != value and not (moved and name in ("program", "mesh")):
            what, old, new = _difference(name, found, value)
            raise ArtifactError(f"{where} ({name})", f"{what} {old}", f"{what} {new}, that of this run")


def _require_same_kind(where: str, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    for name in TAUGHT:
        if name in saved and name not in mine:
            raise ArtifactError(f"{where} ({name})", "a run with a teacher", "its teacher and [distill]")
        if name in mine and name not in saved:
            needed = "one that had a teacher from its first step"
            raise ArtifactError(f"{where} ({name})", "a run without a teacher", needed, "a new folder")


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The first entry that differs, of two tables; otherwise all there is."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return name, old, new
    key = next(key for key in [*new, *old] if old.get(key) != new.get(key))
    return f"{name}.{key}", old.get(key), new.get(key)
