"""What the commands around a finished run do: its page, and the run once more. Each imports only what it needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pairdr.commands import FLAT, OUTPUT
from pairdr.progress import print_text, quiet_libraries
from pairdr.store_config import ReportConfig


def report(
    work: Path,
    *,
    output: Annotated[
        Path | None, Parameter(name=["--output", "-o"], help="Page to write; unset: report.html in the work folder.")
    ] = None,
    data: Annotated[Path | None, Parameter(help="Folder of the run's data; unset: where they were.")] = None,
    options: Annotated[ReportConfig, FLAT] = ReportConfig(),
) -> None:
    """Write one HTML page of a run: table, changes by question, curves, teacher, geometry, data, cost, origin.

    Parameters
    ----------
    work
        A work folder of `pairdr run`, finished or not.
    """
    from pairdr.report_page import write_report

    quiet_libraries()
    print_text(str(write_report(work, output, config=options, data=data)))


def reproduce(
    source: Path,
    *,
    output: Annotated[Path, OUTPUT],
    data: Annotated[
        Path | None, Parameter(help="Data to run on, which may be others; unset: those of then, unchanged.")
    ] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="For machines.")] = False,
) -> int:
    """Run a finished run again and say what differs, step by step; end with 1 where a step made something else.

    Parameters
    ----------
    source
        A work folder of `pairdr run`, or a manifest in it.
    """
    from pairdr.reproduce import reproduce_run

    quiet_libraries()
    found = reproduce_run(source, output, data)
    print_text(json.dumps(asdict(found) | {"equal": found.is_equal}) if as_json else found.format())
    return 0 if found.is_equal else 1
