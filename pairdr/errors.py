"""Every error that pairdr raises on purpose, and the exit code each one gives a command.

```
PairdrError                what happened, where, and the way out        exit 1
├── UsageError             an option, a key or a path that cannot be    exit 2
│   ├── MissingExtraError  a package that an optional part needs        exit 2
│   └── BusyError          another command is at work in the folder     exit 2
├── DataError              a file of the user's data is broken          exit 1
├── ArtefactError          an output folder is missing, broken or does not fit   exit 1
├── ServerError            a database server is absent, refuses, or is full                exit 1
├── RefusedError           the work could go on, but the result would mislead     exit 1
└── StoppedError           told to stop (SIGTERM), and what was done is saved     exit 143
```
"""

from __future__ import annotations

from pathlib import Path


class PairdrError(Exception):
    """One clear sentence about what is wrong, where it is, and the way out.

    Args:
        what: the sentence that says what is wrong.
        path: the file or folder it is in, or its URL.
        line: the line in that file, counted from 1.
        remedy: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, path: object = None, line: int | None = None, remedy: str | None = None) -> None:
        self.what, self.path, self.line, self.remedy = what, path, line, remedy
        place = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(f"{place}{what}" + ("" if remedy is None else f" {remedy}"))


class UsageError(PairdrError):
    """An option, a key or a path that cannot be."""

    exit_code = 2


class MissingExtraError(UsageError):
    """A package that an optional part needs is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"This needs the package {package}.", remedy=f"Install it with: pip install 'pairdr[{extra}]'")


class BusyError(UsageError):
    """Another command is at work in a folder."""

    def __init__(self, path: str | Path) -> None:
        super().__init__("Another command is at work here.", path=path, remedy="Wait for it.")


class DataError(PairdrError):
    """A file of the user's data is broken."""


class ArtefactError(PairdrError):
    """An output folder is missing, broken, or made from other inputs."""


class ServerError(PairdrError):
    """A database server is absent, refuses what is asked, or cannot hold more."""


class RefusedError(PairdrError):
    """The work could go on, but its result would mislead."""


class StoppedError(PairdrError):
    """The process was told to stop (SIGTERM) and saved what was done: 143 is what shells give such a process."""

    exit_code = 143
