"""Saved programs as they can be known before their weights are read: structure, sizes, records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moec.commands.programs import in_words_of_the_door
from moec.errors import ArtifactError
from moec.ir.program import Tokenizer
from moec.models import MANIFEST, is_saved_program
from moec.program import Program
from moec.runtime.artifact import load_program
from moec.runtime.manifest import Manifest, read_manifest, rebuild


@dataclass(frozen=True)
class Outline:
    """The saved program in `folder`: what its manifest says, and `program`, whose weights are on `meta`."""

    folder: str
    manifest: Manifest
    program: Program

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the text it was trained on, where it is known."""
        return self.program.source.tokenizer


def outline_of(folder: str, *, trust: bool = False) -> Outline:
    """The outline of the program saved in `folder`; reads no weights, and asks no more of them than that
    they are there, as long as they were.

    Raises `ArtifactError`: no saved program, one that is cut short, edited, of another version, or that was
    saved without weights.
    """
    _require_saved(folder)
    with in_words_of_the_door():
        manifest = read_manifest(Path(folder), trust=trust)
        _require_weights(Path(folder), manifest)
        program = load_program(folder, trust=trust, device="meta", kind=Program)
    return Outline(folder, manifest, program)


def _require_saved(folder: str) -> None:
    """What lies there is said in the error: a run, whose program is meant, or a model."""
    inside = Path(folder) / "program"
    if (inside / MANIFEST).is_file() and not (Path(folder) / MANIFEST).is_file():
        needed = "the folder of the program itself"
        raise ArtifactError(folder, "a folder with a program in it", needed, str(inside))
    if not is_saved_program(folder):
        found = "no folder of a saved program" if Path(folder).exists() or ":" in folder else "no such folder"
        needed = "a folder saved by moec, such as RUN/program of moec train"
        raise ArtifactError(folder, found, needed, f"moec train {folder} --out RUN" if ":" in folder else "")


def _require_weights(folder: Path, manifest: Manifest) -> None:
    if manifest.weight_files is None and manifest.parts is None:
        found = "a program saved without weights"
        raise ArtifactError(str(folder), found, "a trained program", rebuild(folder, manifest))
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(str(path), "no such file", "the program as it was saved")
        if name.endswith(".safetensors") and path.stat().st_size != record.bytes:
            found = f"{path.stat().st_size:,} bytes"
            raise ArtifactError(str(path), found, f"{record.bytes:,} bytes, as it was saved")
