"""The plans that come with moec, one commented TOML file each."""

from __future__ import annotations

from importlib import resources

from moec.errors import PlanError, nearest


def shipped_names() -> list[str]:
    """Names of the shipped plans, sorted."""
    files = (entry.name for entry in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def shipped_text(name: str) -> str:
    """TOML text of a shipped plan; PlanError with the names there are when `name` is none of them."""
    names = shipped_names()
    if name not in names:
        needed = f"a shipped plan ({', '.join(names)}) or the path of a .toml file"
        raise PlanError("plan", f"no shipped plan '{name}'", needed, nearest(name, names))
    return resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
