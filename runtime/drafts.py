"""A folder that is whole or not there: written under another name, and renamed when it is complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moec.errors import ArtifactError


def require_place(target: Path, mark: str) -> None:
    """Raise `ArtifactError` unless `target` is free, an empty folder, or one with the file `mark`."""
    if not target.exists() or (target / mark).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise ArtifactError(
            str(target), "something else is there", "a new folder, or one with a saved program"
        )


@contextmanager
def draft_of(target: Path, mark: str) -> Iterator[Path]:
    """An empty folder beside `target`, which takes its place at the end; gone when the block fails."""
    require_place(target, mark)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-saving-", dir=target.parent))
    try:
        draft.chmod(target.parent.stat().st_mode & 0o777)
        yield draft
        put_in_place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def put_in_place(draft: Path, target: Path) -> None:
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
