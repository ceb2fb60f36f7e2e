"""`moec` as a job of two ranks, one of which fails on its way into a collective.

The environment says which: FAULT_SIGNAL, FAULT_RANK, FAULT_STEP, FAULT_LAYER, FAULT_DIRECTION. It is the
command itself, started by `moec.runtime.launch`; only the note that a rank takes on entering is intercepted.
"""

from __future__ import annotations

import os
import signal
import sys

from moec.cli import main
from moec.runtime.launch import launch
from moec.runtime.trail import Trail


def _fail_on_the_way() -> None:
    wanted = os.environ["FAULT_LAYER"], os.environ["FAULT_DIRECTION"]
    enter = Trail.enter

    def faulty(trail: Trail, axis: str, op: str) -> None:
        if trail.step() == int(os.environ["FAULT_STEP"]) and trail._place() == wanted:
            os.kill(os.getpid(), signal.Signals[os.environ["FAULT_SIGNAL"]])
        enter(trail, axis, op)

    Trail.enter = faulty  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit(launch([__file__, *sys.argv[1:]], 2))
    if os.environ["RANK"] == os.environ["FAULT_RANK"]:
        _fail_on_the_way()
    main()
