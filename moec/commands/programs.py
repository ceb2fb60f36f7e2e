"""The program that a command is about: compiled now, or saved before."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import moec
from moec.api import place
from moec.errors import ArtifactError, PlanError
from moec.local_program import LocalProgram, load_local
from moec.models import is_saved_program, open_model
from moec.plan import Plan
from moec.program import Program
from moec.runtime.manifest import read_manifest
from moec.runtime.manifest_records import layout_of


def compiled(
    model: str,
    plan: str | None,
    *,
    verify: str | None = None,
    disable: Collection[str] = (),
    meta: bool = False,
    world: int | None = None,
) -> Program:
    """Compile the model called `model` by `plan`, which is read first: its typos cost no capture."""
    chosen = Plan.resolve(plan)
    return moec.compile(open_model(model, meta=meta), chosen, verify=verify, disable=disable, world=world)


def program_of(
    name: str,
    plan: str | None = None,
    *,
    verify: str | None = None,
    meta: bool = False,
    trust: bool = False,
    world: int | None = None,
) -> Program:
    """The saved program in the folder `name`, or the model `name` compiled by `plan` (for `world` ranks)."""
    if not is_saved_program(name):
        return compiled(name, plan, verify=verify, meta=meta, world=world)
    if plan is not None:
        raise PlanError(
            "--plan", f"a plan for {name}, which is a saved program", "a model, or no plan: it has one"
        )
    with in_words_of_the_door():
        return moec.load(name, trust=trust)


@contextmanager
def in_words_of_the_door() -> Iterator[None]:
    """Errors of saved programs say the same thing as it is typed here."""
    try:
        yield
    except ArtifactError as error:
        better = error.nearest.replace("trust=True", "--trust")
        raise ArtifactError(error.where, error.found, error.needed, better) from error


def part_of(
    name: str, plan: str | None, rank: int, world: int, *, verify: str | None = None, trust: bool = False
) -> LocalProgram:
    """What `rank` of `world` holds of the program that `program_of` gives.

    A saved program that was placed on as many ranks is read part by part; any other is made whole first.
    """
    if is_saved_program(name) and plan is None:
        layout = layout_of(read_manifest(Path(name), trust=trust))
        if layout is not None and layout.mesh.world == world:
            return load_local(name, rank, trust=trust)
        whole = place(program_of(name, trust=trust), world)
    else:
        whole = program_of(name, plan, verify=verify, trust=trust, world=world)
    return whole.partition(rank)


def shown_path(path: str | Path) -> str:
    """A path as a user would type it: relative when it is below the current folder."""
    full, here = Path(path).resolve(), Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(path)
