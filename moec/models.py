"""The model that a command line names.

    gpt.py:small                     a function or class of a file, called; or an nn.Module that stands there
    gpt.py:small?layers=2&act=relu   the same with keyword arguments: Python literals, and bare words for text
    hf:config.json                   a Hugging Face decoder built from its config, with fresh weights
    hf:folder                        the same, with the folder's safetensors where it has some

Nothing is ever downloaded. Fresh weights are drawn from a fixed seed, so one name is one model.
"""

from __future__ import annotations

import ast
import inspect
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import nn

from moec.errors import ModelError, nearest

FORMS = "file.py:factory, file.py:factory?key=value, hf:config.json, hf:folder, or a saved program's folder"
MANIFEST = "manifest.json"


def open_model(name: str, *, meta: bool = False, seed: int = 0) -> nn.Module:
    """The model that `name` means (see the module); with `meta` its weights take no memory.

    Runs the user's code. Raises `ModelError`: file or factory missing, arguments that do not fit, or an
    exception of the user's own, shown with the user's line.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta") if meta else nullcontext():
        torch.manual_seed(seed)
        if name.startswith("hf:"):
            from moec.pretrained import open_pretrained

            return open_pretrained(name.removeprefix("hf:"))
        return _from_file(name)


def is_saved_program(name: str) -> bool:
    """Whether `name` is meant as the folder of a saved program, damaged ones included."""
    path = Path(name)
    return (path.is_dir() and not (path / "config.json").is_file()) or (path / MANIFEST).is_file()


def absolute_name(name: str) -> str:
    """The same model, named in a way that holds from any folder."""
    if name.startswith("hf:"):
        return f"hf:{Path(name.removeprefix('hf:')).expanduser().resolve()}"
    place, question, arguments = name.partition("?")
    file, colon, attribute = place.rpartition(":")
    return f"{Path(file).expanduser().resolve()}{colon}{attribute}{question}{arguments}" if colon else name


def module_at(path: str | Path) -> ModuleType:
    """The Python file at `path`, run as a module; its folder goes on `sys.path`, as a script's does."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ModelError(str(path), "no such file", "a Python file with a model in it", _neighbour(file))
    folder = str(file.parent)
    sys.path.insert(0, folder) if folder not in sys.path else None
    # Under a name of its own: the file may be called like a module that is loaded already.
    spec = spec_from_file_location(f"model_file_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ModelError(str(path), "not a Python file", FORMS)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        _raise_users(error, file, f"import of {path}", "a file that can be imported")
    return module


def _neighbour(file: Path) -> str:
    if not file.parent.is_dir():
        return ""
    return nearest(file.name, [path.name for path in file.parent.glob("*.py")])


def _from_file(name: str) -> nn.Module:
    place, _, arguments = name.partition("?")
    file, colon, attribute = place.rpartition(":")
    if not colon:
        _raise_unclear(name, place)
    module = module_at(file)
    if not hasattr(module, attribute):
        known = _factories(module)
        listed = ", ".join(known) or "none is there yet"
        raise ModelError(place, f"no '{attribute}' in {file}", f"one of: {listed}", nearest(attribute, known))
    return _made(getattr(module, attribute), _arguments(arguments, name), Path(file), place)


def _raise_unclear(name: str, place: str) -> NoReturn:
    """Nothing says what is meant: guess from what lies there."""
    path = Path(place)
    if path.suffix == ".py" and path.is_file():
        known = _factories(module_at(path))
        raise ModelError(
            name, "a file without a factory", f"{place}:factory", f"{place}:{known[0]}" if known else ""
        )
    if (path / "config.json").is_file() or path.name == "config.json":
        raise ModelError(name, "a Hugging Face config", "hf: in front of it", f"hf:{place}")
    around = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    found = f"nothing that is called '{place}'" if not path.exists() else "a file that is no model"
    raise ModelError(name, found, FORMS, nearest(path.name, around))


def _factories(module: ModuleType) -> list[str]:
    """Public names defined in the file that can be called without arguments, functions first."""
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    ready = [name for name, value in own.items() if callable(value) and _needs_nothing(value)]
    objects = [name for name, value in vars(module).items() if isinstance(value, nn.Module)]
    return sorted(ready, key=lambda name: inspect.isclass(own[name])) + objects


def _needs_nothing(value: Callable[..., Any]) -> bool:
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):
        return False
    return True


def _arguments(text: str, name: str) -> dict[str, Any]:
    """`layers=2&act=relu` → {"layers": 2, "act": "relu"}, by Python's own grammar, never evaluated."""
    if not text:
        return {}
    try:
        call = ast.parse(f"f({text.replace('&', ',')})", mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args
        return {
            str(k.arg): k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value)
            for k in call.keywords
        }
    except (SyntaxError, ValueError, AssertionError):
        raise ModelError(
            name, f"arguments '{text}'", "key=value, several joined by &: ?layers=2&width=64"
        ) from None


def _made(value: Any, arguments: dict[str, Any], file: Path, place: str) -> nn.Module:
    if isinstance(value, nn.Module):
        if arguments:
            raise ModelError(
                place, "arguments for an nn.Module that is made already", "a factory, or no arguments"
            )
        return value
    if not callable(value):
        raise ModelError(
            place, f"a {type(value).__name__}", "a function that returns an nn.Module, or an nn.Module"
        )
    _require_fitting(value, arguments, place)
    try:
        made = value(**arguments)
    except Exception as error:
        _raise_users(error, file.expanduser().resolve(), place, "a factory that returns an nn.Module")
    if not isinstance(made, nn.Module):
        raise ModelError(place, f"it returned a {type(made).__name__}", "an nn.Module")
    return made


def _require_fitting(factory: Callable[..., Any], arguments: dict[str, Any], place: str) -> None:
    parameters = inspect.signature(factory).parameters
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        odd = next((name for name in arguments if name not in parameters), "")
        takes = ", ".join(map(str, parameters.values())) or "no arguments"
        raise ModelError(place, str(error), f"it takes {takes}", nearest(odd, parameters)) from None


def _raise_users(error: Exception, file: Path, where: str, needed: str) -> NoReturn:
    """The user's exception with the user's line: the innermost one in `file`, or else in its folder."""
    if isinstance(error, SyntaxError) and error.filename:
        line, found = f"{Path(error.filename).name}:{error.lineno}", f"{type(error).__name__}: {error.msg}"
        raise ModelError(f"{where}, {line}", found, needed, (error.text or "").strip()) from error
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == file]
    near = [frame for frame in frames if Path(frame.filename).parent == file.parent]
    frame = (own or near or frames)[-1]
    found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    at = f"{where}, {Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    raise ModelError(f"{at}: {frame.line}" if frame.line else at, found, needed) from error
