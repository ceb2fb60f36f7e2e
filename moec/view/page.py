"""A timeline as one HTML page: no network, no server, nothing beside the file.

The page carries its style, its script, the libraries and the data. A policy in its head allows just these:
the script and the style are named by their digests, everything else is forbidden, and so is turning text into
markup. What comes of a program (names, paths, docstrings, lines of source) is JSON in a block that is not
run; the script writes it as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path

from moec.view.timeline import Timeline
from moec.view.vendored import Library, libraries
from moec.view.whole_file import write_whole

FOLDER = Path(__file__).parent / "page"

# In the order in which they are read: each uses those before it. `page` starts it all.
MODULES = (
    "dom",
    "words",
    "timeline",
    "state",
    "overlays",
    "visible",
    "slots",
    "layout",
    "labels",
    "shapes",
    "camera",
    "choosing",
    "picture",
    "steps",
    "sections",
    "details",
    "inspector",
    "texts",
    "ledger",
    "search",
    "keys",
    "printing",
    "page",
)

# JSON in a script block ends at `</script`, and `<!--` begins a comment in it; U+2028 and U+2029 end lines of
# JavaScript. All of them, and `&`, are spelled as escapes, which JSON reads back as the same characters.
_ESCAPED = {ord(each): f"\\u{ord(each):04x}" for each in "<>&\u2028\u2029"}


def write_page(timeline: Timeline, path: str | Path) -> Path:
    """Write the page of `timeline` to `path`: whole, or not at all. Gives the path.

    Raises `MoecError` where the file cannot be written.
    """
    return write_whole(path, page_of(timeline), "the page")


def page_of(timeline: Timeline) -> str:
    """The page as text."""
    style, script = style_of_page(), script_of_page()
    parts = {
        "policy": policy(style, script),
        "title": html.escape(f"{timeline.name} · moec"),
        "style": style,
        "data": data_of(timeline),
        "script": script,
    }
    # One pass over the template: what is put in is not looked at again.
    template = (FOLDER / "index.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def data_of(timeline: Timeline) -> str:
    """The timeline as JSON that can stand in a script block."""
    spelled = json.dumps(timeline.to_json(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return spelled.translate(_ESCAPED)


def policy(style: str, script: str) -> str:
    """What the page may do: this style and this script, and nothing from anywhere."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_digest(script)}'",
            f"style-src '{_digest(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _digest(text: str) -> str:
    """As a policy spells it: of the characters between the tags."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def style_of_page() -> str:
    """The page's style sheet."""
    return (FOLDER / "page.css").read_text(encoding="utf-8")


def script_of_page() -> str:
    """Libraries with their licences, then the page's own modules."""
    own = [(FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in MODULES]
    return "\n".join([*map(_with_licence, libraries()), *own])


def _with_licence(library: Library) -> str:
    licence = library.license_file.read_text(encoding="utf-8").replace("*/", "* /")
    # A page has no map beside it.
    build = re.sub(r"(?m)^//# sourceMappingURL=.*$", "", library.file.read_text(encoding="utf-8"))
    return f"/* {library.package} {library.version}\n\n{licence}*/\n{build};"
