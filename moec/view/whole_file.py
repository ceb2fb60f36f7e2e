"""A file that is whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from moec.errors import MoecError


def require_place(path: str | Path) -> None:
    """Refuse what a file cannot be written to, before there is anything to write. Raises `MoecError`."""
    path = Path(path)
    if path.is_dir():
        raise MoecError(str(path), "a folder", "the name of a file")
    if not path.parent.is_dir():
        raise MoecError(str(path), f"there is no folder {path.parent}", "a file in a folder that exists")


def write_whole(path: str | Path, text: str, what: str) -> Path:
    """Write `text` to `path` through a draft beside it, so that a reader never sees half of it.

    Gives the path. Raises `MoecError`, which calls the file `what`, where it cannot be written.
    """
    path = Path(path)
    require_place(path)
    try:
        _write(path, text)
    except OSError as error:
        found = f"{what} cannot be written: {error.strerror}"
        raise MoecError(str(path), found, "a file in a folder that can be written to") from error
    return path


def _write(path: Path, text: str) -> None:
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(draft, 0o666 & ~_umask())
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
