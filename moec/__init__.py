"""moec: from an ordinary dense GPT to a sparse, distributed one, with every step a program you can read.

The public names are looked up on first use (PEP 562): `import moec` is quick, loads no PyTorch, and any
module of the package can be imported alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.api import compile, load
    from moec.errors import (
        ArtifactError,
        CaptureError,
        DataError,
        MeshError,
        ModelError,
        MoecError,
        OperatorError,
        PassError,
        PlanError,
        RankError,
        TrainError,
        VerifyError,
    )
    from moec.ir.rewrite import Pass
    from moec.plan import Plan
    from moec.planning.search import search
    from moec.program import Program
    from moec.teaching import teaching_of

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CaptureError",
    "DataError",
    "MeshError",
    "ModelError",
    "MoecError",
    "OperatorError",
    "Pass",
    "PassError",
    "Plan",
    "PlanError",
    "Program",
    "RankError",
    "TrainError",
    "VerifyError",
    "__version__",
    "compile",
    "load",
    "search",
    "teaching_of",
]

_HOME = {
    "compile": "moec.api",
    "load": "moec.api",
    "Pass": "moec.ir.rewrite",
    "Plan": "moec.plan",
    "Program": "moec.program",
    "search": "moec.planning.search",
    "teaching_of": "moec.teaching",
}
_ROOMS = ("capture", "cost", "ir", "passes", "plan", "runtime", "testing", "view")


def __getattr__(name: str) -> object:
    """The public name `name`, imported from where it lives; `AttributeError` for any other."""
    if name in _ROOMS:
        return importlib.import_module(f"moec.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME.get(name, "moec.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
