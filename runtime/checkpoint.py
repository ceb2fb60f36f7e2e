"""Checkpoints on disk: folders that are either whole or not there.

A checkpoint `step-00000200` holds safetensors files and a `manifest.json` with a SHA-256 of each, and of
itself; nothing is pickled. It is written under another name, flushed to the disk, and renamed: a process that
dies at any moment leaves the previous checkpoint as it was, and at worst a folder `.saving-…` that the next
save clears.

One process writes `parameters.safetensors`; rank 3 of a job its share of them, `parameters-00003.safetensors`
(and `parameters-00003-1.safetensors`, … for weights that lie in it in several pieces). `parts.py` reads
either, any part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moec.errors import ArtifactError
from moec.runtime.holding import Part
from moec.runtime.parts import PartReader, stem_of
from moec.runtime.ranks import ALONE, Ranks

FORMAT = "moec checkpoint"
VERSION = 1
MANIFEST = "manifest.json"

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at `step`: `tensors[file][name]` and the JSON `record`."""

    path: Path
    step: int
    tensors: Mapping[str, Tensors]
    record: Mapping[str, Any]


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor | Part]],
    record: Mapping[str, Any],
    keep: int = 2,
    ranks: Ranks = ALONE,
) -> Path:
    """Write `root/step-…`, then remove all but the newest `keep` checkpoints; gives the new one's path.

    `tensors` maps file stems to tensors by name; `record` is JSON. A checkpoint of the same step is replaced.
    Of several ranks, each hands in what it is to save, and all come here; `root` is one folder that all see.
    An error of any rank is raised on all of them, and leaves the checkpoints that are there.
    """
    draft = root / f".saving-{_folder(step)}"
    with ranks.together():
        if ranks.is_first:
            _start_draft(root, draft)
    with ranks.together():
        written = {path.name: _digest(path) for path in _write_files(draft, tensors, ranks)}
    files = {name: digest for row in ranks.gather(written) for name, digest in row.items()}
    with ranks.together():
        if ranks.is_first:
            _publish(root, step, draft, files, record)
            for old in [*root.glob(".saving-*"), *list_checkpoints(root)[:-keep]]:
                shutil.rmtree(old)
    return root / _folder(step)


def _start_draft(root: Path, draft: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".saving-*"):
        shutil.rmtree(leftover)
    draft.mkdir()


def _publish(root: Path, step: int, draft: Path, files: Mapping[str, str], record: Mapping[str, Any]) -> None:
    for name in files:
        if not (draft / name).is_file():
            raise ArtifactError(str(draft / name), "no such file on rank 0", "a folder that all ranks share")
    _write_manifest(draft, step, dict(sorted(files.items())), record)
    sync(draft)
    final = root / _folder(step)
    if final.exists():  # rename() only replaces empty folders
        final.rename(root / f".saving-replaced-{_folder(step)}")
    draft.rename(final)
    sync(root)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`: `step`, `files` (name → SHA-256) and `record`.

    Raises `ArtifactError`, naming the file, when it is missing, edited, or of another version.
    """
    return _read_manifest(path / MANIFEST)


def require_whole_files(path: Path, manifest: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
    """Raise `ArtifactError`, naming the file, unless every byte is as it was saved.

    Of several ranks each looks at its share of the files, so that the job reads them once; all raise alike.
    """
    with ranks.together():
        for name in sorted(manifest["files"])[ranks.rank :: ranks.world]:
            _require_whole(path / name, manifest["files"][name])


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, whoever wrote it, every byte of it checked; tensors whole and on the CPU.

    The random states of several ranks are left out. Raises `ArtifactError`, naming the file, when one is
    missing, cut short, edited, or of another version.
    """
    manifest = read_manifest(path)
    require_whole_files(path, manifest)
    stems = {Path(name).stem for name in manifest["files"]}
    plain = {stem: load_file(path / f"{stem}.safetensors") for stem in stems if stem == stem_of(stem)}
    shared = {stem_of(stem) for stem in stems} - plain.keys() - {"random"}
    reader = PartReader(path) if shared else None
    joined = {stem: reader.read_wholes(stem) for stem in shared if reader is not None}
    return Checkpoint(path, manifest["step"], {**plain, **joined}, manifest["record"])


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in `root`, oldest step first; empty when there is no such folder."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint of the highest step in `root`, if there is one."""
    return next(reversed(list_checkpoints(root)), None)


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _write_files(draft: Path, tensors: Mapping[str, Mapping[str, Tensor | Part]], ranks: Ranks) -> list[Path]:
    """One file a stem, or one for the first piece of every tensor, one for the second, and so on."""
    written = []
    for stem, group in tensors.items():
        parts = {name: _as_part(value) for name, value in group.items()}
        most = max((len(part.pieces) for part in parts.values()), default=0)
        for index in range(most):
            path = draft / f"{_file_name(stem, index, ranks)}.safetensors"
            present = {name: part for name, part in parts.items() if index < len(part.pieces)}
            _write_pieces(path, present, index)
            written.append(path)
    return written


def _as_part(value: Tensor | Part) -> Part:
    return value if isinstance(value, Part) else Part.whole(value)


def _file_name(stem: str, index: int, ranks: Ranks) -> str:
    if ranks.world == 1 and not index:
        return stem
    return f"{stem}-{ranks.rank:05d}" + (f"-{index}" if index else "")


def _write_pieces(path: Path, parts: Mapping[str, Part], index: int) -> None:
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, part in parts.items():
        plain[name] = _alone(part.box(part.pieces[index]).detach(), seen)
        seen.add(plain[name].untyped_storage().data_ptr())
    save_file(plain, path, _offsets(parts, index))
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets the owner alone read its files
    sync(path)


def _offsets(parts: Mapping[str, Part], index: int) -> dict[str, str] | None:
    """Where the pieces lie in their tensors, as torch.distributed.checkpoint writes it."""
    starts = {name: list(part.pieces[index].whole) for name, part in parts.items()}
    if not any(map(any, starts.values())):
        return None
    told = {name: {"saved_offsets": start} for name, start in starts.items()}
    return {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(told)}


def _alone(tensor: Tensor, seen: set[int]) -> Tensor:
    """The tensor itself where it owns its whole memory, else a copy: safetensors takes no shared memory."""
    storage = tensor.untyped_storage()
    whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
    if whole and storage.data_ptr() not in seen:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _write_manifest(folder: Path, step: int, files: Mapping[str, str], record: Mapping[str, Any]) -> None:
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "step": step}
    manifest |= {"files": dict(files), "record": dict(record)}
    manifest["digest"] = digest_of(manifest)
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sync(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        missing = "no such checkpoint" if not path.parent.is_dir() else "no manifest.json"
        raise ArtifactError(str(path), missing, "a folder written by the trainer", _alternative(path.parent))
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("digest")
        whole = digest == digest_of(manifest)
        manifest["digest"] = digest
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(path, "not the JSON that was written") from error
    if manifest.get("format") == FORMAT and manifest.get("version") != VERSION:
        found = f"version {manifest.get('version')} of the format"
        raise ArtifactError(str(path), found, f"version {VERSION}", _alternative(path.parent))
    if not whole:
        raise _damaged(path, "text that was edited (its digest differs)")
    return manifest


def _require_whole(path: Path, digest: str) -> None:
    if not path.is_file():
        raise _damaged(path, "no such file")
    if _digest(path) != digest:
        raise _damaged(path, _how_damaged(path))


def _how_damaged(path: Path) -> str:
    try:
        with safetensors.safe_open(path, framework="pt"):
            return "other bytes than were saved (its digest differs)"
    except safetensors.SafetensorError:
        return "a file cut short or overwritten (not readable as safetensors)"


def _damaged(path: Path, found: str) -> ArtifactError:
    return ArtifactError(str(path), found, "the file as it was saved", _alternative(path.parent))


def _alternative(folder: Path) -> str:
    """The newest other checkpoint beside `folder`, as a hint for errors."""
    others = [path for path in list_checkpoints(folder.parent) if path != folder]
    return f"remove this one to resume from '{others[-1]}'" if others else ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's JSON."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
