"""`python -m moec`: the command line."""

from __future__ import annotations

from moec.cli import main

if __name__ == "__main__":
    main()
