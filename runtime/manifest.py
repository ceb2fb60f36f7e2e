"""The table of contents of a saved program: what is in the folder, and how to tell that it is whole.

`manifest.json` is plain data, checked field by field when it is read. It carries a SHA-256 of every other
file and of itself, so damage and edits are noticed. That is no signature, and none is needed: loading runs no
code, whatever the manifest says.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moec.errors import ArtifactError

FORMAT, VERSION, NAME = "moec program", 1, "manifest.json"
NEEDED = "a program saved by program.save(folder)"
REBUILD = "moec compile MODEL --plan PLAN --out FOLDER"
TRUST = "trust=True, if the edit is yours"
FileName = Annotated[str, Field(pattern=r"^(stages/|parts/)?[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """Length and SHA-256 of one file."""

    bytes: int
    sha256: str


class WeightRecord(_Record):
    """One weight: its name in the program, and the tensor that holds it (tied weights share one)."""

    name: str
    tensor: str
    dtype: str
    shape: list[int]
    parameter: bool
    trainable: bool
    persistent: bool = True


class RegionRecord(_Record):
    """What `moec.ir.Region` knows of a region."""

    kind: str
    index: int
    path: str
    source: str
    roles: dict[str, str]
    settings: dict[str, Any]


class TokenizerRecord(_Record):
    """What `moec.ir.Tokenizer` knows of a tokenizer."""

    name: str
    digest: str


class SourceRecord(_Record):
    """What `moec.ir.Source` knows of the dense model; `unused` names the tensors of its idle state."""

    name: str
    vocabulary: int
    dtype: str
    max_positions: int | None
    aliases: dict[str, str]
    unused: dict[str, str]
    notes: list[str]
    tokenizer: TokenizerRecord | None = None


class PartGroup(_Record):
    """The weights that are split over the same `axes` (sorted; none: whole on every rank), by the names of
    their tensors: the `number`-th `of` several files a place. `idle`: read by no rank."""

    axes: list[str]
    tensors: list[str]
    number: int = 1
    of: int = 1
    idle: bool = False


class Sheet(_Record):
    """What is recorded of one graph beside its text.

    `nodes`: region ('' for the root) → node → the user's module path and source line; `placements`: likewise,
    where on the mesh a value or a weight (`self.up.weight`) lies.
    """

    stage: str
    origins: dict[str, dict[str, Any]]
    ledger: list[dict[str, Any]]
    notes: list[str]
    certificates: list[dict[str, Any]]
    regions: dict[str, RegionRecord]
    nodes: dict[str, dict[str, tuple[str, str]]]
    placements: dict[str, dict[str, str]] = {}


class PartitionRecord(Sheet):
    """The program of one rank, the same for every rank: the file of its `text`, and its `weights`, each →
    the weight of the whole program that it is a part of, as the layout says."""

    text: FileName
    weights: dict[str, str]


class Manifest(Sheet):
    """Everything of a program but its text and its tensors.

    `weight_files`: file → its tensors, None for a program saved without weights, or in parts. `stages`: name
    of a stage → file with its text. For a placed program `layout` is its mesh and the placements of its
    weights, `groups` the first group of ranks along each axis, `partition` the program of its ranks, and
    `parts` the groups of its weights, None when it was saved without.
    """

    format: Literal["moec program"] = "moec program"
    version: int = VERSION
    moec: str
    torch: str
    training: bool
    fingerprint: str
    source: SourceRecord
    plan: str | None
    weights: list[WeightRecord]
    weight_files: dict[FileName, list[str]] | None
    stages: dict[str, FileName]
    files: dict[FileName, FileRecord]
    layout: dict[str, Any] | None = None
    groups: dict[str, list[int]] = {}
    partition: PartitionRecord | None = None
    parts: list[PartGroup] | None = None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, sealed."""
    data = manifest.model_dump()
    try:
        text = json.dumps(data | {"seal": _seal(data)}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        found = f"records that are not plain data: {error}"
        raise ArtifactError(str(folder), found, "plain data in region settings") from None
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path, *, trust: bool) -> Manifest:
    """The manifest of a saved program; `ArtifactError` when missing, cut, edited or of another version."""
    path = folder / NAME
    if not path.is_file():
        found = "no manifest.json" if folder.is_dir() else "no such folder"
        raise ArtifactError(str(folder), found, NEEDED, REBUILD)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        seal = data.pop("seal")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ArtifactError(str(path), "not the JSON that was written", NEEDED, REBUILD) from None
    _require_version(path, data)
    if seal != _seal(data) and not trust:
        raise ArtifactError(str(path), "an edited manifest: its seal does not fit", NEEDED, TRUST)
    return _checked(path, data)


def _require_version(path: Path, data: dict[str, Any]) -> None:
    if data.get("format") != FORMAT:
        raise ArtifactError(str(path), f"format {data.get('format')!r}", NEEDED, REBUILD)
    if data.get("version") != VERSION:
        found = f"version {data.get('version')!r} of the format, written by moec {data.get('moec')!s:.20}"
        raise ArtifactError(str(path), found, f"version {VERSION}", f"load it with that moec, or {REBUILD}")


def _checked(path: Path, data: dict[str, Any]) -> Manifest:
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ArtifactError(str(path), f"{field}: {first['msg']}", NEEDED, REBUILD) from None


def _seal(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def record_of(path: Path) -> FileRecord:
    """Length and digest of a file on disk."""
    with path.open("rb") as file:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def rebuild(folder: Path, manifest: Manifest) -> str:
    """What makes the folder anew."""
    world = f", world={len(manifest.groups['world'])}" if "world" in manifest.groups else ""
    return f"moec.compile({manifest.source.name}(…), plan{world}).save({str(folder)!r})"


def require_whole(folder: Path, name: str, manifest: Manifest, *, trust: bool = False) -> Path:
    """The path of a file that is as it was when saved; with `trust` it may have been edited."""
    path, needed, again = folder / name, manifest.files.get(name), rebuild(folder, manifest)
    if needed is None or not path.is_file():
        raise ArtifactError(str(path), "no such file", NEEDED, again)
    if trust:
        return path
    found = record_of(path)
    if found.bytes < needed.bytes:
        raise ArtifactError(str(path), f"{found.bytes:,} bytes: cut short", f"{needed.bytes:,} bytes", again)
    if found != needed:
        better = f"{again}; or {TRUST}" if name.endswith(".py") else again
        raise ArtifactError(str(path), "it was edited after saving", f"SHA-256 {needed.sha256[:12]}…", better)
    return path
