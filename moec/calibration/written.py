"""A hardware file: TOML of what was measured, in as many digits as mean anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w

from moec.cost.machine.hardware import Hardware

_DIGITS = 4


def to_toml(hardware: Hardware) -> str:
    """The text of a file that `Hardware.from_toml` reads."""
    return tomli_w.dumps(_rounded(hardware.model_dump(exclude_none=True)))


def write(hardware: Hardware, path: Path) -> None:
    """Write it; raises `OSError` where that is not possible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(hardware), encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
