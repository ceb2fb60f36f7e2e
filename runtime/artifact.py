"""Save a program to a folder and load it again, without running anything that came with it.

    saved/
      program.py           the program, readable, and what is loaded
      partition.py         of a placed program: that of one rank, the same for all ranks
      stages/*.py          its text at earlier stages, for `diff`
      weights.safetensors  every tensor once (several files when large; none for a program on `meta`)
      parts/*.safetensors  of a placed program, instead: what each rank holds (see `part_files`)
      manifest.json        plan, origins, ledger, certificates, regions, mesh and placements; a SHA-256 of
                           every file

A folder is written under another name and renamed, so it is whole or not there. Loading parses `program.py`
with `moec.ir.parse`, which knows operators and weights and no other Python.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from moec.errors import ArtifactError
from moec.ir.program import Program
from moec.ir.text import program_text
from moec.plan import Parallel, Plan, Train

from .drafts import draft_of
from .manifest import (
    NAME,
    FileRecord,
    Manifest,
    PartGroup,
    WeightRecord,
    read_manifest,
    rebuild,
    record_of,
    require_whole,
    write_manifest,
)
from .manifest_records import (
    layout_fields,
    layout_of,
    partition_record,
    sheet_fields,
    source_record,
    unused_tensors,
)
from .part_files import FOLDER, group_parts, read_whole, write_whole
from .saved import Saved
from .weights import LARGEST_FILE, describe_weights, read_tensors, weights_of, write_tensors

PROGRAM, PARTITION = "program.py", "partition.py"
P = TypeVar("P", bound=Program)


def fingerprint(program: Program) -> str:
    """A hash of what a program *is*: its text, where its weights come from, and the plan that shaped it.

    Neither weights nor how it is trained take part: a run may be resumed with more steps. Nor do device and
    mesh, so that it may be resumed on others: a placed program has the fingerprint that it had before.
    """
    origins = {name: origin.record() for name, origin in program.origins.items()}
    code = ast.unparse(ast.parse(program_text(program.graph)))  # without comments: shapes and placements
    parts = [re.sub(r"device='[^']*'", "device", code), json.dumps(origins, sort_keys=True)]
    return hashlib.sha256("\0".join([*parts, _shaping(program.plan)]).encode()).hexdigest()


def _shaping(plan: Any) -> str:
    if not isinstance(plan, Plan):
        return ""
    return plan.model_copy(update={"train": Train(), "parallel": Parallel()}).to_toml()


def save_program(
    program: Program,
    directory: str | Path,
    *,
    local: Program | None = None,
    largest_file: int = LARGEST_FILE,
) -> Path:
    """Write `program` to the folder `directory`, replacing an earlier saved program; gives its path.

    Weight files hold at most `largest_file` bytes (a bigger tensor gets one of its own). A program on `meta`
    is saved without weights. A placed program takes the program of one of its ranks along, `local`, and its
    weights are written in parts. Raises `ArtifactError` when `directory` holds something else already.
    """
    target = Path(directory)
    with draft_of(target, NAME) as draft:
        weights = describe_weights(program.graph)
        tensors = _tensors(program, weights)
        weight_files = parts = None
        if tensors is not None and program.layout is not None:
            parts = group_parts(weights, program.layout, unused_tensors(program.source), largest_file)
            (draft / FOLDER).mkdir()
            write_whole(draft, parts, program.layout, tensors)
        elif tensors is not None:
            weight_files = write_tensors(draft, tensors, largest_file)
        write_records(program, draft, local=local, weight_files=weight_files, parts=parts)
    return target


def write_records(
    program: Program,
    folder: Path,
    *,
    local: Program | None = None,
    weight_files: dict[str, list[str]] | None = None,
    parts: list[PartGroup] | None = None,
    known: Mapping[str, FileRecord] | None = None,
) -> None:
    """Write everything of `program` but its weights, and at last the manifest of all files in `folder`.

    `weight_files` and `parts` say which of them hold weights; `known`: files that others looked at already.
    """
    (folder / PROGRAM).write_text(program.text(), encoding="utf-8")
    stages = _write_stages(program, folder)
    partition = None
    if local is not None:
        (folder / PARTITION).write_text(local.text(), encoding="utf-8")
        partition = partition_record(local, program, PARTITION)
    known = known or {}
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = Manifest(
        moec=_version(), torch=torch.__version__, training=program.training,
        fingerprint=fingerprint(program), source=source_record(program.source), plan=_plan_text(program),
        weights=describe_weights(program.graph), weight_files=weight_files, parts=parts, partition=partition,
        stages=stages,
        files={name: known.get(name) or record_of(folder / name) for name in files},
        **layout_fields(program.layout), **sheet_fields(program),
    )  # fmt: skip
    write_manifest(folder, manifest)


def _tensors(program: Program, weights: list[WeightRecord]) -> dict[str, Tensor] | None:
    """What goes into safetensors, each tensor once; None when the program is on `meta`."""
    if any(parameter.device.type == "meta" for parameter in program.graph.parameters()):
        return None
    values = weights_of(program.graph)
    tensors = {record.tensor: values[record.tensor] for record in weights}
    tensors |= unused_tensors(program.source)
    hollow = next((name for name, value in tensors.items() if value.device.type == "meta"), None)
    if hollow is not None:
        raise ArtifactError("save", f"{hollow} is on meta, the parameters are not", "values for every tensor")
    return tensors


def _version() -> str:
    """The version of moec that is installed: a remark in the manifest, which nothing depends on."""
    try:
        return version("moec")
    except PackageNotFoundError:
        return "not installed"


def _write_stages(program: Program, folder: Path) -> dict[str, str]:
    """Stage → file; stages of the same graph share one."""
    (folder / "stages").mkdir()
    files: dict[int | str, str] = {}
    stages: dict[str, str] = {}
    graphs = program.stages
    for name in [*graphs, *(name for name in program.texts if name not in graphs)]:
        key: int | str = id(graphs[name]) if name in graphs else program.texts[name]
        if key not in files:
            plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
            files[key] = f"stages/{len(files):02d}_{plain}.py"
            (folder / files[key]).write_text(program.text(name), encoding="utf-8")
        stages[name] = files[key]
    return stages


def _plan_text(program: Program) -> str | None:
    if program.plan is None:
        return None
    if not isinstance(program.plan, Plan):
        raise ArtifactError("save", f"a plan of type {type(program.plan).__name__}", "a moec.Plan")
    return program.plan.to_toml()


# loading


@overload
def load_program(
    directory: str | Path, *, trust: bool = False, device: torch.device | str = "cpu"
) -> Program:
    """Without `kind`, as an `ir.Program`."""


@overload
def load_program(
    directory: str | Path, *, trust: bool = False, device: torch.device | str = "cpu", kind: type[P]
) -> P:
    """With `kind`, as one of that class."""


def load_program(
    directory: str | Path,
    *,
    trust: bool = False,
    device: torch.device | str = "cpu",
    kind: type[Any] = Program,
) -> Any:
    """The program saved in `directory`: same names, same bits, same records; weights on `device`.

    No code of the folder is run, trusted or not. `trust=True` accepts a `program.py` or a manifest edited by
    hand, and every operator torch knows, in-place ones included. `device="meta"` reads no weights. `kind` is
    the class to build. Raises `ArtifactError` when anything is missing, cut short, edited, or of another
    version.
    """
    folder, place = Path(directory), torch.device(device)
    manifest = read_manifest(folder, trust=trust)
    saved = Saved(folder, manifest, layout_of(manifest), trust)
    tensors = _read_weights(saved, place)
    graph = saved.graph(PROGRAM, manifest, manifest.weights, tensors, place)
    program = saved.program(kind, graph, manifest, tensors)
    if not trust and fingerprint(program) != manifest.fingerprint:
        found = f"a program that moec {manifest.moec} wrote and this one understands in another way"
        raise ArtifactError(str(folder), found, "the program as it was saved", rebuild(folder, manifest))
    return program


def _read_weights(saved: Saved, device: torch.device) -> dict[str, Tensor] | None:
    manifest = saved.manifest
    if device.type == "meta" or (manifest.weight_files is None and manifest.parts is None):
        return None
    if saved.layout is not None:
        return read_whole(saved.folder, manifest, saved.layout, device)
    tensors: dict[str, Tensor] = {}
    for file, names in (manifest.weight_files or {}).items():
        tensors |= read_tensors(require_whole(saved.folder, file, manifest), names, device)
    return tensors
