"""Save a program to a folder and load it again, without running anything that came with it.

    saved/
      program.py           the program, readable, and what is loaded
      stages/*.py          its text at earlier stages, for `diff`
      weights.safetensors  every tensor once (several files when large; none for a program on `meta`)
      manifest.json        plan, origins, ledger, certificates, regions; a SHA-256 of every file

A folder is written under another name and renamed, so it is whole or not there. Loading parses `program.py`
with `moec.ir.parse`, which knows operators and weights and no other Python.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, fx

from moec.errors import ArtifactError
from moec.ir.certificate import Certificate
from moec.ir.origins import Origin, Origins
from moec.ir.parse import parse_program
from moec.ir.program import Program
from moec.ir.retarget import on_device
from moec.ir.shapes import propagate
from moec.ir.text import program_text
from moec.plan import Plan, Train

from .manifest import (
    NAME,
    NEEDED,
    REBUILD,
    Manifest,
    WeightRecord,
    read_manifest,
    record_of,
    require_whole,
    write_manifest,
)
from .manifest_records import (
    ledger_of,
    places_of,
    region_records,
    regions_of,
    restore_places,
    source_of,
    source_record,
    unused_key,
)
from .weights import LARGEST_FILE, describe_weights, read_tensors, rebuild_weights, weights_of, write_tensors

PROGRAM = "program.py"
P = TypeVar("P", bound=Program)


def fingerprint(program: Program) -> str:
    """A hash of what a program *is*: its text, where its weights come from, and the plan that shaped it.

    Neither weights nor how it is trained take part: a run may be resumed with more steps.
    """
    origins = {name: asdict(origin) for name, origin in program.origins.items()}
    shaped = program.plan.model_copy(update={"train": Train()}) if isinstance(program.plan, Plan) else None
    parts = [program_text(program.graph), json.dumps(origins, sort_keys=True)]
    return hashlib.sha256("\0".join([*parts, shaped.to_toml() if shaped else ""]).encode()).hexdigest()


def save_program(program: Program, directory: str | Path, *, largest_file: int = LARGEST_FILE) -> Path:
    """Write `program` to the folder `directory`, replacing an earlier saved program; gives its path.

    Weight files hold at most `largest_file` bytes (a bigger tensor gets one of its own). A program on `meta`
    is saved without weights. Raises `ArtifactError` when `directory` holds something else already.
    """
    target = Path(directory)
    if _is_something_else(target):
        raise ArtifactError(
            str(target), "something else is there", "a new folder, or one with a saved program"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-saving-", dir=target.parent))
    try:
        draft.chmod(target.parent.stat().st_mode & 0o777)
        _write(program, draft, largest_file)
        _swap(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _is_something_else(target: Path) -> bool:
    if not target.exists() or (target / NAME).is_file():
        return False
    return not target.is_dir() or any(target.iterdir())


def _swap(draft: Path, target: Path) -> None:
    """Put `draft` in the place of `target`; what was there is kept until the new folder stands."""
    old = draft.with_name(f"{draft.name}-replaced")
    if target.exists():
        target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write(program: Program, folder: Path, largest_file: int) -> None:
    (folder / PROGRAM).write_text(program.text(), encoding="utf-8")
    stages = _write_stages(program, folder)
    weights = describe_weights(program.graph)
    tensors = _tensors(program, weights)
    weight_files = None if tensors is None else write_tensors(folder, tensors, largest_file)
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = Manifest(
        moec=_version(), torch=torch.__version__, stage=program.stage, training=program.training,
        fingerprint=fingerprint(program), source=source_record(program.source), plan=_plan_text(program),
        weights=weights, weight_files=weight_files,
        origins={name: asdict(origin) for name, origin in program.origins.items()},
        ledger=[asdict(entry) for entry in program.ledger], notes=list(program.ledger.notes),
        certificates=[certificate.to_json() for certificate in program.certificates],
        regions=region_records(program.graph), nodes=places_of(program.graph), stages=stages,
        files={name: record_of(folder / name) for name in files},
    )  # fmt: skip
    write_manifest(folder, manifest)


def _tensors(program: Program, weights: list[WeightRecord]) -> dict[str, Tensor] | None:
    """What goes into safetensors, each tensor once; None when the program is on `meta`."""
    if any(parameter.device.type == "meta" for parameter in program.graph.parameters()):
        return None
    values = weights_of(program.graph)
    tensors = {record.tensor: values[record.tensor] for record in weights}
    tensors |= {unused_key(name): value for name, value in program.source.unused.items()}
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
) -> Program: ...


@overload
def load_program(
    directory: str | Path, *, trust: bool = False, device: torch.device | str = "cpu", kind: type[P]
) -> P: ...


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
    text = require_whole(folder, PROGRAM, manifest, trust=trust).read_text(encoding="utf-8")
    parsed = parse_program(text, file=str(folder / PROGRAM), trusted=trust)
    tensors = _read_weights(folder, manifest, place)
    transient = {record.name for record in manifest.weights if not record.persistent}
    graph = parsed.assemble(rebuild_weights(manifest.weights, tensors), regions_of(manifest), transient)
    on_device(graph, place if tensors is not None else torch.device("meta"))
    propagate(graph)
    restore_places(graph, manifest)
    return _program(kind, graph, folder, manifest, tensors, trust)


def _program(
    kind: type[P],
    graph: fx.GraphModule,
    folder: Path,
    manifest: Manifest,
    tensors: dict[str, Tensor] | None,
    trust: bool,
) -> P:
    try:
        program = kind(
            graph, source=source_of(manifest.source, tensors), stage=manifest.stage,
            origins=Origins({name: Origin(**data) for name, data in manifest.origins.items()}),
            ledger=ledger_of(manifest),
            certificates=tuple(map(Certificate.from_json, manifest.certificates)),
            plan=Plan.from_text(manifest.plan) if manifest.plan is not None else None,
            texts=_read_stages(folder, manifest, trust),
        )  # fmt: skip
    except (TypeError, KeyError, AttributeError) as error:
        found = f"records that do not fit: {error}"
        raise ArtifactError(str(folder / NAME), found, NEEDED, REBUILD) from None
    return program.train(manifest.training)


def _read_weights(folder: Path, manifest: Manifest, device: torch.device) -> dict[str, Tensor] | None:
    if manifest.weight_files is None or device.type == "meta":
        return None
    tensors: dict[str, Tensor] = {}
    for file, names in manifest.weight_files.items():
        tensors |= read_tensors(require_whole(folder, file, manifest), names, device)
    return tensors


def _read_stages(folder: Path, manifest: Manifest, trust: bool) -> dict[str, str]:
    return {
        stage: require_whole(folder, file, manifest, trust=trust).read_text(encoding="utf-8")
        for stage, file in manifest.stages.items()
    }
