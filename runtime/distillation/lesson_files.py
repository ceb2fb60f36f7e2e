"""A folder of lessons: what a teacher said of the samples of a run, a shard of them a file.

    lessons/manifest.json                     what was stored, of whom, of which text (`Facts`)
    lessons/lessons-000000256.safetensors     samples 256, 257, …: `words` and `log_shares` [n, S, K]

A shard is whole or not there, and knows whose it is: its header holds the digest of the facts, its first
sample, and a SHA-256 of all that. So a writer that dies loses the shard it was at, and a shard that was cut
short, edited, renamed, or comes from another folder is refused by name. Nothing is pickled.

Legend: n samples of a shard, S sequence, K likeliest words.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from moec.errors import ArtifactError
from moec.runtime.checkpoint import digest_of, sync

FORMAT = "moec lessons"
VERSION = 1
MANIFEST = "manifest.json"
_DRAFT, _HEADER = ".storing-", "lessons"
_SHARES: dict[str, type[np.floating[Any]]] = {"f32": np.float32, "f16": np.float16}
_SHORT_WORDS = 2**16  # words of smaller vocabularies are kept in two bytes

Shard = tuple[NDArray[Any], NDArray[Any]]


class Facts(BaseModel):
    """What makes lessons these lessons; folders with equal facts hold the same.

    `teacher`: its identity. `data`, `seed`, `sequence`: what the samples are. `batch`: sequences that the
    teacher read at once on a rank; `shard`: samples a file. `dtype` of the teacher's arithmetic, `shares` of
    what is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: dict[str, Any]
    data: str
    seed: int
    sequence: int
    vocabulary: int
    top_k: int
    temperature: float
    dtype: Literal["fp32", "bf16"]
    shares: Literal["f32", "f16"] = "f32"
    shard: int
    batch: int

    @property
    def digest(self) -> str:
        """A SHA-256 of all of them."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def bytes_per_token(self) -> int:
        """What a token takes on disk, headers aside."""
        words = 2 if self.vocabulary <= _SHORT_WORDS else 4
        return self.top_k * (words + np.dtype(_SHARES[self.shares]).itemsize)

    def firsts(self, samples: range) -> Iterator[int]:
        """The first sample of every shard that holds some of `samples`."""
        if samples:
            yield from range(samples.start - samples.start % self.shard, samples.stop, self.shard)

    def packed(self, words: NDArray[Any], log_shares: NDArray[Any]) -> Shard:
        """The two in the dtypes of the files."""
        short = np.uint16 if self.vocabulary <= _SHORT_WORDS else np.int32
        return words.astype(short), log_shares.astype(_SHARES[self.shares])


def write_manifest(folder: Path, facts: Facts) -> None:
    """Write the facts, durably; what was there is replaced at once."""
    told: dict[str, Any] = {"format": FORMAT, "version": VERSION, "facts": facts.model_dump(mode="json")}
    told["digest"] = digest_of(told)
    draft = folder / f"{_DRAFT}{MANIFEST}"
    draft.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _put(draft, folder / MANIFEST)


def read_facts(folder: Path) -> Facts:
    """The facts of the lessons in `folder`; `ArtifactError` where there are none, or they were edited."""
    path = folder / MANIFEST
    if not path.is_file():
        missing = "no manifest.json" if folder.is_dir() else "no such folder"
        raise ArtifactError(str(path), missing, "a folder of stored lessons", "store_lessons(…)")
    try:
        told = json.loads(path.read_bytes())
        digest, version = told.pop("digest"), told.get("version")
        if told.get("format") == FORMAT and version != VERSION:
            raise ArtifactError(str(path), f"version {version} of the format", f"version {VERSION}")
        if digest != digest_of(told):
            raise ArtifactError(str(path), "text that was edited (its digest differs)", "the file as it was")
        return Facts.model_validate(told["facts"])
    except (ValueError, KeyError, AttributeError, TypeError, ValidationError) as error:
        raise ArtifactError(str(path), "not the JSON that was written", "the file as it was") from error


def shard_path(folder: Path, first: int) -> Path:
    """The file whose first sample is `first`."""
    return folder / f"lessons-{first:09d}.safetensors"


def stored_firsts(folder: Path) -> list[int]:
    """The first samples of the shards that are there, as their names tell."""
    stem = shard_path(folder, 0).stem.rstrip("0")
    names = (path.stem.removeprefix(stem) for path in sorted(folder.glob(f"{stem}*.safetensors")))
    return [int(name) for name in names if name.isdigit()]


def write_shard(folder: Path, facts: Facts, first: int, shard: Shard) -> None:
    """Write one shard (see `Facts.packed`), durably; it is whole or not there."""
    words, log_shares = shard
    header = {"facts": facts.digest, "first": str(first), "digest": _digest(facts, first, shard)}
    path = shard_path(folder, first)
    draft = folder / f"{_DRAFT}{path.name}"
    tensors = {"words": words, "log_shares": log_shares}
    # In one entry: safetensors writes several in any order, and the same lessons are to be the same bytes.
    safetensors.numpy.save_file(tensors, draft, metadata={_HEADER: json.dumps(header)})
    draft.chmod(folder.stat().st_mode & 0o666)  # safetensors lets the owner alone read its files
    _put(draft, path)


def require_shard(folder: Path, facts: Facts, first: int) -> Path:
    """The path of a shard that is there, complete, and of these lessons, as far as its header tells."""
    path = shard_path(folder, first)
    if not path.is_file():
        raise ArtifactError(str(path), f"no lessons from sample {first} on", "a shard", "store_lessons(…)")
    header = _header(path)
    if header.get("facts") != facts.digest:
        raise _refused(path, "lessons of another teacher, text or setting than the manifest tells")
    if header.get("first") != str(first):
        raise _refused(path, f"lessons from sample {header.get('first')} on")
    return path


def read_shard(folder: Path, facts: Facts, first: int) -> Shard:
    """Words and log shares of a shard, every byte of it checked; `ArtifactError`, naming the file."""
    path = require_shard(folder, facts, first)
    with safetensors.safe_open(path, framework="np") as file:
        if set(file.keys()) != {"words", "log_shares"}:
            raise _refused(path, f"tensors {', '.join(sorted(file.keys()))}")
        shard = file.get_tensor("words"), file.get_tensor("log_shares")
    if _header(path).get("digest") != _digest(facts, first, shard):
        raise _refused(path, "other bytes than were stored (their digest differs)")
    return shard


def clear_drafts(folder: Path) -> None:
    """Remove what writers that died have left."""
    for draft in folder.glob(f"{_DRAFT}*"):
        draft.unlink()


def _header(path: Path) -> Mapping[str, str]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            told = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            return told if isinstance(told, dict) else {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise _refused(path, "a file cut short or overwritten (not readable as safetensors)") from error


def _digest(facts: Facts, first: int, shard: Shard) -> str:
    digest = hashlib.sha256(f"{facts.digest} {first}".encode())
    for array in shard:
        digest.update(f" {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _refused(path: Path, found: str) -> ArtifactError:
    needed = "the shard as it was stored"
    return ArtifactError(str(path), found, needed, "remove the file and store again: the others stay")


def _put(draft: Path, path: Path) -> None:
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)
