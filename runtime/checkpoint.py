"""Checkpoints on disk: folders that are either whole or not there.

A checkpoint `step-00000200` holds safetensors files and a `manifest.json` with a SHA-256 of each, and of
itself; nothing is pickled. It is written under another name, flushed to the disk, and renamed: a process that
dies at any moment leaves the previous checkpoint as it was, and at worst a folder `.saving-…` that the next
save clears.
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
    root: Path, step: int, tensors: Mapping[str, Tensors], record: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `root/step-…`, then remove all but the newest `keep` checkpoints; gives the new one's path.

    `tensors` maps file stems to tensors by name; `record` is JSON. A checkpoint of the same step is replaced.
    """
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".saving-*"):
        shutil.rmtree(leftover)
    draft = root / f".saving-{_folder(step)}"
    draft.mkdir()
    for stem, group in tensors.items():
        _write_tensors(draft / f"{stem}.safetensors", group)
    _write_manifest(draft, step, record)
    _sync(draft)
    final = root / _folder(step)
    if final.exists():  # rename() only replaces empty folders
        final.rename(root / f".saving-replaced-{_folder(step)}")
    draft.rename(final)
    _sync(root)
    for old in [*root.glob(".saving-*"), *list_checkpoints(root)[:-keep]]:
        shutil.rmtree(old)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, every byte of it checked; tensors on the CPU.

    Raises `ArtifactError`, naming the file, when one is missing, cut short, edited, or of another version.
    """
    manifest = _read_manifest(path / MANIFEST)
    tensors: dict[str, Tensors] = {}
    for name, digest in manifest["files"].items():
        _require_whole(path / name, digest)
        tensors[Path(name).stem] = load_file(path / name)
    return Checkpoint(path, manifest["step"], tensors, manifest["record"])


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in `root`, oldest step first; empty when there is no such folder."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint of the highest step in `root`, if there is one."""
    return next(reversed(list_checkpoints(root)), None)


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _write_tensors(path: Path, tensors: Tensors) -> None:
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain[name] = _alone(tensor.detach(), seen)
        seen.add(plain[name].untyped_storage().data_ptr())
    save_file(plain, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets the owner alone read its files
    _sync(path)


def _alone(tensor: Tensor, seen: set[int]) -> Tensor:
    """The tensor itself where it owns its whole memory, else a copy: safetensors takes no shared memory."""
    storage = tensor.untyped_storage()
    whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
    if whole and storage.data_ptr() not in seen:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _write_manifest(folder: Path, step: int, record: Mapping[str, Any]) -> None:
    files = {path.name: _digest(path) for path in sorted(folder.glob("*.safetensors"))}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files, "record": dict(record)}
    manifest["digest"] = _digest_of(manifest)
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _sync(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        missing = "no such checkpoint" if not path.parent.is_dir() else "no manifest.json"
        raise ArtifactError(str(path), missing, "a folder written by the trainer", _alternative(path.parent))
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("digest")
        whole = digest == _digest_of(manifest)
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


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
