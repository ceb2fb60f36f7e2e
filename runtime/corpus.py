"""Which files a model is trained on.

Every machine that runs moec has a few megabytes of real text on it: the source of Python's standard library.
It is the default corpus, found where the running interpreter keeps it.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from moec.errors import DataError, nearest

#: Folders under the standard library that are not the library: what users installed, and its tests, whose
#: files hold megabytes of encodings on purpose and broken syntax.
NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """The files to read, in order; `skipped` are the binary ones (holding NUL bytes) met in a folder."""

    files: tuple[Path, ...]
    skipped: tuple[Path, ...] = ()


def standard_library() -> Corpus:
    """Python's own library, `.py` files only, sorted; the same list on every run of one interpreter."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in root.rglob("*.py") if not NOT_THE_LIBRARY & set(path.relative_to(root).parts)]
    if not found:
        raise DataError(str(root), "no .py files (a Python without the source of its library)", "text files")
    return Corpus(tuple(sorted(found)))


def find_texts(*sources: str | Path) -> Corpus:
    """The files named by `sources`: paths, folders (read recursively, hidden files left out) and globs.

    Sorted within each source, each file once. Raises `DataError` for a source that is not there, a glob or
    folder without files, and a file named outright that is binary. Without sources: `standard_library()`.
    """
    if not sources:
        return standard_library()
    chosen: dict[Path, None] = {}
    skipped: dict[Path, None] = {}
    for source in sources:
        texts, binary = _texts_of(str(source))
        chosen.update(dict.fromkeys(texts))
        skipped.update(dict.fromkeys(binary))
    return Corpus(tuple(chosen), tuple(skipped))


def _texts_of(source: str) -> tuple[list[Path], list[Path]]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _texts_in_folder(path)
    found = [path] if path.is_file() else _files_of_glob(str(path))
    if not found:
        raise DataError(source, _nothing(source), "a text file, a folder or a glob", _neighbour(path))
    for file in found:
        if _is_binary(file):
            raise DataError(str(file), "NUL bytes: a binary file", "text")
    return found, []


def _files_of_glob(pattern: str) -> list[Path]:
    return sorted(path for path in map(Path, glob(pattern, recursive=True)) if path.is_file())


def _texts_in_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    visible = [path for path in sorted(folder.rglob("*")) if not _is_hidden(path.relative_to(folder))]
    files = [path for path in visible if path.is_file()]
    texts = [path for path in files if not _is_binary(path)]
    if not texts:
        raise DataError(str(folder), f"a folder with {len(files)} files, none of them text", "text files")
    return texts, [path for path in files if path not in set(texts)]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(8192)
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error.strerror}", "a readable text file") from error


def _nothing(source: str) -> str:
    return "a glob that matches no file" if has_magic(source) else "no such file or folder"


def _neighbour(path: Path) -> str:
    return nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
