"""The command line: the list of commands, `--config`, and errors as one sentence with an exit code."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

from pairdr import (
    __version__,
    audit_commands,
    commands,
    exchange_commands,
    report_commands,
    serve_commands,
    store_commands,
)
from pairdr.config import RunConfig, change_options
from pairdr.errors import PairdrError, UsageError

app = App(
    name="pairdr",
    help="Train, evaluate and search dense passage retrievers the PAIR way.",
    version=__version__,
    default_parameter=Parameter(consume_multiple=True, negative_iterable=""),
    suppress_keyboard_interrupt=False,  # main says what happened
)
for command in (
    commands.run,
    commands.demo,
    commands.check,
    commands.mine,
    commands.teach,
    commands.label,
    commands.train,
    commands.encode,
    commands.search,
    commands.evaluate,
    store_commands.compare,
    audit_commands.audit,
    audit_commands.apply_audit,
    report_commands.report,
    report_commands.reproduce,
    serve_commands.serve,
    exchange_commands.import_data,
    exchange_commands.export_data,
    store_commands.upsert,
    store_commands.delete,
    store_commands.compact,
    store_commands.export,
    store_commands.index,
    store_commands.index_words,
    store_commands.push,
    store_commands.verify,
):
    app.command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end with its exit code: 0, 1 for a failure, 2 for wrong usage."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and tokens[:1] != ["train"]:
            raise UsageError("Only `pairdr train` runs in several processes.", remedy="Start it without torchrun.")
        app.config = _read_config(tokens)
        outcome = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except PairdrError as error:
        _fail(str(error), error.exit_code)
    except CycloptsError as error:
        _fail(_first_pairdr_error(error) or str(error), 2)
    except BrokenPipeError:  # the reader of our output has closed it: `pairdr search ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'The system'}: {error.strerror or error}. Check the place and its rights.", 1)
    except Exception as error:  # the last line of defence: one sentence for the user, the rest on request
        if os.environ.get("PAIRDR_DEBUG"):
            raise
        _fail(f"Unexpected {type(error).__name__}: {error}. PAIRDR_DEBUG=1 shows where; please report it.", 1)
    except KeyboardInterrupt:
        _fail("Interrupted. What was finished stays; the same command goes on from there.", 130)
    else:
        sys.exit(outcome if isinstance(outcome, int) else 0)


def _read_config(tokens: Sequence[str]) -> tuple[Dict, ...]:
    """Turn `--config FILE` into defaults for the command's options; unknown sections and options are refused."""
    place = next((at for at, token in enumerate(tokens) if token == "--config" or token.startswith("--config=")), None)
    if place is None:
        return ()
    if "=" not in tokens[place] and place + 1 >= len(tokens):
        raise UsageError("--config needs a file.")
    path = Path(tokens[place].partition("=")[2] or tokens[place + 1])
    if not path.is_file():
        raise UsageError("There is no such file.", path=path, remedy="Check --config.")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"Broken TOML: {error}.", path=path, remedy="Mend it.") from error
    plain = {key: value for key, value in content.items() if key in ("arms", "rounds")}
    sections = {key: value for key, value in content.items() if key not in plain}
    try:
        change_options(RunConfig(), sections)
    except UsageError as error:
        raise UsageError(error.what, path=path, remedy=error.remedy) from error
    values: dict[str, Any] = {key: value for section in sections.values() for key, value in section.items()} | plain
    return (
        Dict(
            {key.replace("_", "-"): value for key, value in values.items()},
            use_commands_as_keys=False,
            source=str(path),
        ),
    )


def _first_pairdr_error(error: BaseException) -> str | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PairdrError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _fail(text: str, code: int) -> None:
    sys.stderr.write(f"pairdr: {text}\n")
    sys.exit(code)
