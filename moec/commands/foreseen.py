"""What the commands that foresee costs share: the program on `meta`, its phase, sizes, and the hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from moec.api import place
from moec.commands.outline import outline_of
from moec.commands.programs import compiled
from moec.cost.cost import Cost
from moec.cost.machine.hardware import Hardware
from moec.cost.timing.predict import Prediction, predict
from moec.errors import CostError, PlanError, nearest
from moec.foresight import Phase
from moec.models import is_saved_program
from moec.program import Program

OPTIONS = {"B": "--batch", "S": "--sequence", "L": "--past"}
NEEDED = {"training": ("B", "S"), "forward": ("B", "S"), "decode": ("B", "L")}


@dataclass(frozen=True)
class Asked:
    """Of what the cost is asked: sizes of one rank, each left out where it stays a letter.

    `past`: positions that the cache holds. `ranks`: left out, as the plan says. `hardware`: a file, or the
    name of a shipped one.
    """

    phase: str = "training"
    batch: int | None = None
    sequence: int | None = None
    past: int | None = None
    ranks: int | None = None
    hardware: str | None = None

    @property
    def checked_phase(self) -> Phase:
        """The phase; raises `CostError` with the nearest one."""
        phases: tuple[Phase, ...] = get_args(Phase)
        for phase in phases:
            if phase == self.phase:
                return phase
        needed = f"one of {', '.join(phases)}"
        raise CostError("--phase", f"'{self.phase}'", needed, nearest(self.phase, phases))

    @property
    def letters(self) -> dict[str, int]:
        """The numbers that were given, by letter; a step of decoding writes one token a row."""
        given = {"B": self.batch, "S": self.sequence, "L": self.past}
        foreign = [name for name in given if given[name] is not None and name not in self._own]
        if foreign:
            own = ", ".join(OPTIONS[name] for name in self._own)
            raise CostError(OPTIONS[foreign[0]], f"a size that {self.phase} does not have", own)
        found = {name: number for name, number in given.items() if number is not None}
        return found | {"n": 1, "m": 1} if found and self.phase == "decode" else found

    @property
    def _own(self) -> tuple[str, ...]:
        return NEEDED[self.checked_phase]

    def require_room(self, program: Program) -> None:
        """Raise `CostError` for a length that the program has no positions for: it would not run."""
        name, limit = self._own[-1], program.source.max_positions
        length = self.letters.get(name)
        if limit is not None and length is not None and length > limit:
            needed = f"at most {limit:,}, the model's limit"
            raise CostError(OPTIONS[name], f"{length:,} positions", needed)

    def opened_hardware(self) -> Hardware | None:
        """The hardware, if any; raises `CostError` where a size is missing that its times depend on."""
        if self.hardware is None:
            return None
        hardware = Hardware.named(self.hardware)
        missing = [OPTIONS[name] for name in self._own if name not in self.letters]
        if missing:
            raise CostError(
                "--hardware", f"no {' and no '.join(missing)}", f"{missing[0]} N: time is a number"
            )
        return hardware

    def predicted(self, cost: Cost) -> Prediction | None:
        """The time on the hardware, if any; raises `MeshError` where there are fewer devices than ranks."""
        hardware = self.opened_hardware()
        letters: dict[str, Any] = self.letters
        return None if hardware is None else predict(cost, hardware, **letters)


def program_on_meta(model: str, plan: str | None, ranks: int | None, *, trust: bool = False) -> Program:
    """The program without values: compiled by `plan`, or as it was saved; on `ranks`, or as planned."""
    if not is_saved_program(model):
        return compiled(model, plan, verify="off", meta=True, world=ranks)
    if plan is not None:
        needed = "a model, or no plan: it has one"
        raise PlanError("--plan", f"a plan for {model}, which is a saved program", needed)
    program = outline_of(model, trust=trust).program
    return program if ranks is None else place(program, ranks)
