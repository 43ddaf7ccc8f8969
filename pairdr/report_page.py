"""`pairdr report`: one HTML page of a work folder, which needs nothing else: no host, no script, no other file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pairdr.errors import UsageError
from pairdr.files import explain_failed_writes, replace_file
from pairdr.page_style import frame_page, write_text
from pairdr.report import Absent, Report, gather_report
from pairdr.report_sections import (
    show_changes,
    show_costs,
    show_data,
    show_geometry,
    show_origin,
    show_stages,
    show_table,
    show_teaching,
    show_verdict,
)
from pairdr.store_config import ReportConfig

PAGE = "report.html"
T = TypeVar("T")


def write_report(
    work: str | Path,
    output: str | Path | None = None,
    *,
    config: ReportConfig = ReportConfig(),
    data: str | Path | None = None,
) -> Path:
    """Write the page of a work folder.

    Args:
        work: a work folder of `pairdr run`, finished or not.
        output: the page, a name that ends in .html; None is `report.html` in the work folder.
        config: what is shown, and how much of it.
        data: the folder of the run's data; None is where they were.

    Returns:
        The page's place.

    Raises:
        UsageError: `output` is no name of a page, or PAIR is to be compared with what is not there.
        ArtefactError: this is no work folder, or the page cannot be written.
        DataError: `data` is not what the run was made of.
    """
    work = Path(work)
    place = work / PAGE if output is None else Path(output)
    if place.suffix.lower() not in (".html", ".htm") or place.is_dir():
        raise UsageError("This is no name of a page.", path=place, remedy="Let it end in .html.")
    page = format_page(gather_report(work, config, None if data is None else Path(data)))
    with explain_failed_writes(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, page)
    return place


def format_page(report: Report) -> str:
    """Return the page as HTML."""
    sections = (
        (
            "results",
            "Results",
            "Every system on the same questions; more is better. The p-values are over questions, of one training run, "
            "and not corrected for several rows: pairdr compare corrects, and takes several seeds.",
            _show(report.table, show_table),
        ),
        (
            "changes",
            "What changed, question by question",
            "Those that gain and lose most: what was asked, what the labels want, and what came first.",
            _show(report.changes, show_changes),
        ),
        (
            "training",
            "Training",
            "Losses should fall, and s(q,p+) should stay above the other two; look at the trend, for a batch is noisy.",
            _show(report.stages, show_stages),
        ),
        (
            "teacher",
            "Teacher and labels",
            "Right candidates should score above s_pos, and few known positives below s_neg.",
            _show(report.teaching, show_teaching),
        ),
        (
            "geometry",
            "Geometry before and after",
            "PAIR wants a passage nearer to its question than to wrong passages: s(q,p+) to the right of s(p+,p-).",
            _show(report.geometry, show_geometry),
        ),
        (
            "data",
            "Data",
            "What the run was given; the model never sees what lies beyond the limit of a text's length.",
            _show(report.data, show_data),
        ),
        (
            "cost",
            "Cost",
            "The time of each step when it last ran, and the most memory that the process had held by its end.",
            show_costs(report.steps),
        ),
        (
            "reproduce",
            "How to reproduce it",
            "The same data, options and versions on the same kind of processor give the same fingerprints.",
            show_origin(report),
        ),
    )
    links = "".join(f'<a href="#{name}">{write_text(title)}</a>' for name, title, _, _ in sections)
    parts = [
        f"<header><h1>{write_text(report.name)}</h1>{show_verdict(report.table)}"
        f'<nav aria-label="Contents">{links}</nav></header>',
        *(
            f'<section id="{name}"><h2>{write_text(title)}</h2><p class="how">{write_text(how)}</p>{body}</section>'
            for name, title, how, body in sections
        ),
    ]
    return frame_page(f"pairdr: {report.name}", "\n".join(parts))


def _show(part: T | Absent, form: Callable[[T], str]) -> str:
    return f'<p class="absent">Not here. {write_text(part.why)}</p>' if isinstance(part, Absent) else form(part)
