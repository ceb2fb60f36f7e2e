"""Wheel, sdist, and the wheel made from the sdist hold the whole package under one name, and install."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import moec

ROOT = Path(__file__).parents[1]
FOLDERS = ("moec", "passes", "runtime")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packed, its links kept as links, so that building leaves nothing in the clone."""
    copy, no_caches = tmp_path_factory.mktemp("tree"), shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        if (ROOT / name).exists():  # an unpacked sdist has moec/passes itself, and no passes beside it
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=no_caches)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def dists(tree: Path) -> dict[str, Path]:
    """The three builds: a wheel from the clone, an sdist, and a wheel made from that sdist."""
    build = (sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check")
    run(*build, "--wheel", "--outdir", "direct", cwd=tree)
    run(*build, "--outdir", "through", cwd=tree)
    (wheel,), (sdist,) = tree.glob("direct/*.whl"), tree.glob("through/*.tar.gz")
    (rebuilt,) = tree.glob("through/*.whl")
    return {"wheel": wheel, "sdist": sdist, "rebuilt": rebuilt}


def members(dist: Path) -> set[str]:
    """The files of an archive, without the sdist's leading folder."""
    if dist.suffix == ".whl":
        return set(zipfile.ZipFile(dist).namelist())
    with tarfile.open(dist) as archive:
        files = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in files), "an sdist holds plain files, no links"
    return {member.name.partition("/")[2] for member in files}


@pytest.fixture(scope="module")
def sources(tree: Path) -> set[str]:
    """Every file of the package, code and data, as `moec/…`; the links are followed."""
    roots = {name: tree / name for name in ("moec", "moec/passes", "moec/runtime")}
    return {
        f"{name}/{path.relative_to(root).as_posix()}"
        for name, root in roots.items()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["wheel", "sdist", "rebuilt"])
def test_everything_is_packed_under_one_name(dists: dict[str, Path], sources: set[str], kind: str) -> None:
    found = members(dists[kind])
    assert {"moec/passes/__init__.py", "moec/runtime/__init__.py", "moec/py.typed"} <= found
    assert sources <= found, sorted(sources - found)
    assert not {name for name in found if name.startswith(("passes/", "runtime/"))}


def test_both_wheels_are_the_same(dists: dict[str, Path]) -> None:
    direct, rebuilt = zipfile.ZipFile(dists["wheel"]), zipfile.ZipFile(dists["rebuilt"])
    assert set(direct.namelist()) == set(rebuilt.namelist())
    for name in direct.namelist():
        if name.startswith("moec/"):
            assert direct.read(name) == rebuilt.read(name), name


def new_environment(folder: Path) -> Path:
    """The interpreter of a fresh environment that sees the installed dependencies behind its own packages."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    # A .pth file appends: what is installed in the new environment itself is found first.
    (site / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return folder / "bin/python"


def install(python: Path, *what: str | Path) -> None:
    """`pip install` without looking at an index or at dependencies."""
    quiet = ("--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall", "-q")
    run(sys.executable, "-m", "pip", "--python", python, "install", *quiet, *what, cwd=python.parent)


LOOK = """
import moec, moec.passes, moec.runtime, sys
assert "torch" not in sys.modules, "import moec is meant to be quick"
from moec.errors import PlanError
assert moec.PlanError is PlanError
print(moec.__version__, moec.__file__, moec.passes.__file__, moec.runtime.__file__, sep="\\n")
"""


@pytest.mark.parametrize("kind", ["wheel", "sdist", "rebuilt"])
def test_it_installs_and_imports(dists: dict[str, Path], kind: str, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "env")
    install(python, dists[kind])
    version, *files = run(python, "-c", LOOK, cwd=tmp_path).splitlines()
    assert version == moec.__version__
    assert all(file.startswith(str(tmp_path)) for file in files), files


def test_it_installs_editable(tree: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "env")
    install(python, "-e", tree)
    _, *files = run(python, "-c", LOOK, cwd=tmp_path).splitlines()
    assert files == [str(tree / "moec" / name / "__init__.py") for name in ("", "passes", "runtime")]


def test_the_version_stands_in_one_place(dists: dict[str, Path]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    assert dists["wheel"].name.split("-")[1] == dists["rebuilt"].name.split("-")[1] == moec.__version__


def test_public_names_stand_in_their_rooms() -> None:
    """The names a type checker sees and the names that are looked up lazily are the same names."""
    tree = ast.parse(Path(moec.__file__).read_text(encoding="utf-8"))
    typed = {
        (alias.name, node.module)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name, _ in typed} == set(moec.__all__) - {"__version__"}
    assert typed == {(name, moec._HOME.get(name, "moec.errors")) for name, _ in typed}
    for name in moec.__all__:
        assert getattr(moec, name) is not None
        assert name in dir(moec)


def test_a_name_that_is_not_public_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'moec' has no attribute 'compil'"):
        moec.compil  # noqa: B018
