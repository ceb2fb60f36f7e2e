"""The libraries that the page carries: which, of which version, and how to fetch them anew.

`page/vendor/vendored.json` lists them in the order in which a page loads them, each with the digest of its
file. To renew one, change its version there and run `make vendor`, which asks npm for the published package
and takes the minified build and the licence out of it, unchanged.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).parent / "page" / "vendor"
LISTED = FOLDER / "vendored.json"


@dataclass(frozen=True)
class Library:
    """A published package: `build` is the file taken out of it, `sha256` the digest of that file."""

    package: str
    version: str
    license: str
    build: str
    sha256: str = ""

    @property
    def file(self) -> Path:
        """Where the build lies here."""
        return FOLDER / Path(self.build).name

    @property
    def license_file(self) -> Path:
        """Where its licence lies here."""
        return self.file.with_name(f"LICENSE-{self.file.name.partition('.')[0]}.txt")


def libraries() -> list[Library]:
    """All of them, each after those that it needs."""
    return [Library(**entry) for entry in json.loads(LISTED.read_text(encoding="utf-8"))]


def digest(file: Path) -> str:
    """The sha256 of a file, in hex."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def renew() -> None:
    """Fetch every listed version by npm and write the digests anew."""
    renewed = [_fetch(library) for library in libraries()]
    listed = json.dumps([asdict(library) for library in renewed], indent=2)
    LISTED.write_text(listed + "\n", encoding="utf-8")


def _fetch(library: Library) -> Library:
    with tempfile.TemporaryDirectory() as folder:
        name = f"{library.package}@{library.version}"
        asked = ["npm", "pack", "--silent", "--pack-destination", folder, name]
        subprocess.run(asked, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as packed:
            for member, file in (
                (library.build, library.file),
                ("LICENSE", library.license_file),
            ):
                found = packed.extractfile(f"package/{member}")
                assert found is not None, f"{name} has no file {member}"
                file.write_bytes(found.read())
    print(f"{name} → {library.file.name}")
    return replace(library, sha256=digest(library.file))


if __name__ == "__main__":
    renew()
