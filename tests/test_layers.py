"""Arrows point one way: no file imports from a floor above its own, not even inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LANGUAGE = {"errors", "ir", "plan"}
BELOW = {
    "errors": set(),
    "ir": {"errors"},
    "plan": {"errors", "ir"},
    "capture": LANGUAGE,
    "cost": LANGUAGE | {"runtime.ops"},
    "testing": LANGUAGE,
    "runtime.ops": {"errors"},
    "passes": LANGUAGE | {"runtime.ops"},
    "runtime": LANGUAGE | {"runtime.ops"},
}
ROOF = {"view", "program", "api", "cli", "commands", "__main__", "__init__"}
ROOF |= {"models", "pretrained", "explain", "bisect", "difference", "values", "reproduction", "local_program"}
ROOF |= {"simulate", "simulation", "all_ranks", "decoder", "local_decoder", "students", "importance"}
ROOF |= {"objective", "teaching", "foresight", "planning", "calibration", "sweep", "drawing", "cli_costs"}


def room_of(module: str) -> str:
    """`moec.runtime.ops.route` → `runtime.ops`, `moec.ir` → `ir`; a name of the roof → itself.

    Tests are in no room: one of a pass may capture a model, and compare with the tools of `testing`.
    """
    if module.split(".")[0] == "tests":
        return "tests"
    parts = module.split(".")[1:] or ["__init__"]
    return "runtime.ops" if parts[:2] == ["runtime", "ops"] else parts[0]


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import in a file of `package`, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from moec import ir` and `from . import ops` name a room; other names are not modules.
            named = base in ("moec", "moec.runtime")
            yield from ((node.lineno, f"{base}.{alias.name}" if named else base) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def wrong_arrows(source: str, module: str, where: str, is_package: bool = False) -> list[str]:
    """`file:line: room → room` for each import of `source` that points up or sideways, or is bare."""
    room, package = room_of(module), module if is_package else module.rpartition(".")[0]
    found = []
    for line, name in sorted(set(imported(ast.parse(source), package))):
        top = name.split(".")[0]
        if top in ("passes", "runtime"):
            found.append(f"{where}:{line}: import of bare `{name}`; its name is `moec.{name}`")
        elif top == "moec" and room in BELOW and room_of(name) not in BELOW[room] | {room}:
            found.append(f"{where}:{line}: {room} → {room_of(name)} (`{name}`)")
    return found


def sources() -> Iterator[tuple[Path, str]]:
    """Each Python file with its dotted name; passes/ and runtime/ are seen through their links in moec/."""
    for top in ("moec", "moec/passes", "moec/runtime", "tests", "examples", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield path, name.removesuffix(".__init__")


def test_arrows_point_one_way() -> None:
    found = []
    for path, module in sources():
        where, is_package = str(path.relative_to(ROOT)), path.name == "__init__.py"
        found += wrong_arrows(path.read_text(encoding="utf-8"), module, where, is_package)
    assert not found, "\n" + "\n".join(dict.fromkeys(found))


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module) for path, module in sources() if module.split(".")[0] == "moec"}
    assert rooms <= BELOW.keys() | ROOF, (
        f"give {sorted(rooms - BELOW.keys() - ROOF)} a floor here and in docs/house.md"
    )
    assert {"errors", "ir", "passes", "runtime"} <= rooms


@pytest.mark.parametrize("package", ["moec", "moec/runtime"])
def test_packages_above_the_lowest_floor_import_nothing(package: str) -> None:
    """Importing `moec.runtime.ops` runs these two files first, so they may not pull anything in."""
    body = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    eager = [name for node in body if not isinstance(node, ast.If) for _, name in imported(node, "moec")]
    assert not [name for name in eager if name.startswith("moec")]


@pytest.mark.parametrize(
    ("source", "module", "arrow"),
    [
        ("import moec.passes.runner", "moec.ir.text", "f.py:1: ir → passes (`moec.passes.runner`)"),
        ("x = 1\nfrom moec import api", "moec.plan.schema", "f.py:2: plan → api (`moec.api`)"),
        ("from moec import load", "moec.plan.schema", "f.py:1: plan → load (`moec.load`)"),
        ("def f():\n    from ..runtime import train", "moec.passes.lift", "f.py:2: passes → runtime"),
        (
            "from ..mesh import Mesh",
            "moec.runtime.ops.route",
            "f.py:1: runtime.ops → runtime (`moec.runtime.mesh`)",
        ),
        ("from ...ir import Program", "moec.runtime.ops.route", "f.py:1: runtime.ops → ir (`moec.ir`)"),
        ("importlib.import_module('moec.cli')", "moec.cost.walk", "f.py:1: cost → cli (`moec.cli`)"),
        ("from passes.runner import run", "tests.test_x", "f.py:1: import of bare `passes.runner`"),
        ("import runtime", "moec.api", "f.py:1: import of bare `runtime`; its name is `moec.runtime`"),
        ("from moec.runtime.ops import route", "moec.passes.lift", None),
        ("from moec.runtime import ops", "moec.passes.lift", None),
        ("from ..ir import Program", "moec.passes.lift", None),
        ("from moec.testing import decoders", "tests.passes.test_lift", None),
        ("import moec\nfrom moec.passes import runner", "moec.api", None),
    ],
)
def test_the_layer_test_sees(source: str, module: str, arrow: str | None) -> None:
    """Each way of writing an import is seen, with file, line and arrow, and the allowed ones pass."""
    found = wrong_arrows(source, module, "f.py")
    assert len(found) == (arrow is not None)
    assert arrow is None or found[0].startswith(arrow)
