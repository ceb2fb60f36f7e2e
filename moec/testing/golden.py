"""Texts that must not change unnoticed."""

from __future__ import annotations

import difflib
import os
from pathlib import Path


def assert_golden(text: str, path: str | Path) -> None:
    """`text` is what the file `path` holds; `make golden` (MOEC_GOLDEN=1) rewrites the file instead.

    `make golden` runs the tests marked `@pytest.mark.golden`. Lines are compared without trailing blanks,
    and the file ends in one newline.
    """
    path, tidy = Path(path), "\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n"
    if os.environ.get("MOEC_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tidy, encoding="utf-8")
        return
    assert path.is_file(), f"{path} does not exist yet; `make golden` writes it"
    kept = path.read_text(encoding="utf-8")
    if kept != tidy:
        diff = difflib.unified_diff(kept.splitlines(), tidy.splitlines(), str(path), "now", lineterm="")
        shown = "\n".join(diff)
        raise AssertionError(
            f"{path} differs; if the change is meant, run `make golden` and review it\n{shown}"
        )
