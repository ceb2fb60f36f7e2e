"""The page as a file: whole or not there, alone, closed to what it was not written with."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from moec.errors import MoecError
from moec.view.page import FOLDER, MODULES, data_of, page_of, write_page
from moec.view.vendored import FOLDER as VENDORED
from moec.view.vendored import digest, libraries
from tests.view.timelines import timeline


def between(text: str, start: str, end: str) -> str:
    """The one thing that stands between two marks."""
    (found,) = re.findall(f"{re.escape(start)}(.*?){re.escape(end)}", text, flags=re.DOTALL)
    return str(found)


def test_the_path_is_given_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = write_page(timeline(), tmp_path / "out.html")
    assert path == tmp_path / "out.html"
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text(encoding="utf-8") == page_of(timeline())


def test_what_a_new_file_may_be_read_by_is_not_narrowed(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert write_page(timeline(), tmp_path / "out.html").stat().st_mode == plain.stat().st_mode


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.html").write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(MoecError, match="No space left on device"):
        write_page(timeline(), tmp_path / "out.html")
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]
    assert (tmp_path / "out.html").read_text() == "old"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoecError, match="there is no folder"):
        write_page(timeline(), tmp_path / "nowhere" / "out.html")
    with pytest.raises(MoecError, match="a folder"):
        write_page(timeline(), tmp_path)


def test_the_same_timeline_is_the_same_page() -> None:
    assert page_of(timeline(6)) == page_of(timeline(6))


def test_the_policy_names_style_and_script_by_their_digests() -> None:
    text = page_of(timeline())
    policy = between(text, 'Content-Security-Policy" content="', '">')
    for tag, kind in (("style", "style-src"), ("script", "script-src")):
        content = between(text, f"<{tag}>", f"</{tag}>")
        told = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{told}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_nothing_is_asked_for_from_elsewhere() -> None:
    markup = (FOLDER / "index.html").read_text()
    style = (FOLDER / "page.css").read_text()
    assert not re.findall(r"\b(?:src|href)=\"(?!#)", markup)
    assert "url(" not in style
    assert "@import" not in style


def test_the_pages_own_script_never_makes_markup_of_text() -> None:
    own = "".join((FOLDER / f"{name}.js").read_text() for name in MODULES)
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert way not in own


def test_every_module_of_the_folder_is_in_the_page() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.js")) == sorted(MODULES)


def test_data_are_read_back_as_they_were() -> None:
    hostile = timeline(name="</script><!--<b>&amp;\u2028\u2029\x1b[31m'\"\\ é 漢 🙂")
    written = data_of(hostile)
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == json.loads(json.dumps(hostile.to_json()))


def test_placeholders_in_data_are_data() -> None:
    text = page_of(timeline(name="{{script}}", text="{{style}} {{data}}"))
    assert '"text":"{{style}} {{data}}"' in text
    assert "<title>{{script}} · moec</title>" in text


def test_an_amount_that_is_no_number_is_refused() -> None:
    steps = timeline().steps
    with pytest.raises(ValueError, match="not JSON compliant"):
        page_of(timeline(steps=(replace(steps[0], seconds=float("nan")),)))


def test_libraries_are_the_listed_ones_with_their_licences() -> None:
    text = page_of(timeline())
    for library in libraries():
        assert digest(library.file) == library.sha256, f"{library.file.name} is not what was fetched"
        assert f"/* {library.package} {library.version}" in text
        assert (
            "ermission" in library.license_file.read_text()
            or "Redistribution" in library.license_file.read_text()
        )
        assert library.license_file.read_text().strip() in text
    listed = {path for library in libraries() for path in (library.file, library.license_file)}
    assert listed | {VENDORED / "vendored.json"} == set(VENDORED.iterdir())
