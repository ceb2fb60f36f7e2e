"""The group of all commands: what a user's mistake looks like, whichever command it is made in."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from moec.errors import MoecError, nearest

INTERRUPTED = 130


class Commands(TyperGroup):
    """The group of all commands: prints errors as four lines, in place of tracebacks and usage screens."""

    def main(self, args: Any = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        """Run, and leave with the right status; returns only when `standalone_mode` is off."""
        try:
            status = super().main(args, standalone_mode=False, **extra)
        except MoecError as error:
            status = self._refuse(error)
        except typer.Abort:
            status = INTERRUPTED
        except BrokenPipeError:
            # What reads us has seen enough (`| head`). Python flushes once more on its way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 1
        except OSError as error:
            status = self._refuse(_of_system(error))
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            status = self._refuse(_of_usage(error, self))
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else 0)

    def _refuse(self, error: MoecError) -> int:
        from moec.commands.screen import show_error

        show_error(error)
        return 2


def _of_system(error: OSError) -> MoecError:
    """A file that cannot be read or written."""
    where = str(error.filename or "file")
    return MoecError(where, (error.strerror or str(error)).lower(), "a place that can be read and written")


def _of_usage(error: Any, group: TyperGroup) -> MoecError:
    """A word of the command line that is not understood."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "moec"
    help_ = f"see {where} --help"
    message = error.format_message().rstrip(".")
    name = getattr(error, "option_name", None)
    if name is not None and context is not None:
        known = [
            word for parameter in context.command.params for word in parameter.opts if word.startswith("--")
        ]
        if name not in known:
            return MoecError(where, f"no option '{name}'", f"one of {', '.join(known)}", nearest(name, known))
    words = message.partition("No such command ")[2].split("'")
    if len(words) > 1:
        names = list(group.commands)
        return MoecError(
            where, f"no command '{words[1]}'", f"one of {', '.join(names)}", nearest(words[1], names)
        )
    return MoecError(where, message[:1].lower() + message[1:], help_)
