"""Charts as inline SVG: lines and histograms, drawn for a phone's width, coloured by the page's style.

A chart is text and shapes only; every text that is not our own is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import NamedTuple

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 12, 42
LINE = 15
"""Height of a line of text."""
COLOURS = 5
"""Colours and dashes that the page's style has; further groups begin anew."""
MOST_DOTS, MOST_POINTS = 60, 400
"""Points of a line up to which each has a dot; and up to which none are put together."""


@dataclass(frozen=True)
class Histogram:
    """Counts per bin of one or more groups over the same edges."""

    edges: list[float]
    counts: dict[str, list[int]]


class Line(NamedTuple):
    """A named line through the points that have a value."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


class Mark(NamedTuple):
    """A vertical rule with a label."""

    x: float
    label: str


class Axis:
    """Values to places: from `low` at `start` to `high` at `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, whole: bool = False) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if low == high:
            room = max(0.5, abs(low) / 1000)
            low, high = low - room, high + room
        self.low, self.high, self.ticks = low, high, list_ticks(low, high, whole=whole)
        self.start, self.end = start, end

    def place(self, value: float) -> float:
        """Return where a value stands."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def draw_lines(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    *,
    marks: Sequence[Mark] = (),
    floor: float | None = None,
) -> str:
    """Return a figure with one line per group.

    Args:
        lines: what is drawn; those without a value are left out.
        title: what the chart shows, in words.
        x_label: name and unit of the horizontal axis.
        y_label: name and unit of the vertical axis.
        marks: vertical rules.
        floor: a value that the vertical axis has to reach.
    """
    lines = [line for line in lines if any(value is not None for value in line.y)]
    xs = [*(x for line in lines for x in line.x), *(mark.x for mark in marks)]
    ys = [y for line in lines for y in line.y if y is not None] + ([] if floor is None else [floor])
    across, up = Axis(xs, LEFT, WIDTH - RIGHT, whole=True), Axis(ys, HEIGHT - BOTTOM, TOP + LINE * len(marks))
    shapes = [_draw_axes(across, up, x_label, y_label), *_draw_marks(marks, across)]
    for number, line in enumerate(lines):
        points = [(across.place(x), up.place(y)) for x, y in _thin(line)]
        path, colour = " ".join(f"{x},{y}" for x, y in points), number % COLOURS
        shapes.append(f'<polyline class="l{colour}" points="{path}"/>')
        dots = points if len(points) <= MOST_DOTS else []
        shapes += [f'<circle class="a{colour}" cx="{x}" cy="{y}" r="2"/>' for x, y in dots]
    return _frame(shapes, title, [line.name for line in lines])


def draw_histogram(
    histogram: Histogram,
    title: str,
    x_label: str,
    *,
    marks: Sequence[Mark] = (),
    whole: bool = False,
) -> str:
    """Return a figure with one outline per group: the share of the group in each bin.

    Args:
        histogram: what is drawn; empty groups are left out.
        title: what the chart shows, in words.
        x_label: name and unit of the horizontal axis.
        marks: vertical rules, such as thresholds; those beyond the bins widen the axis.
        whole: the values are whole numbers.
    """
    edges, groups = histogram.edges, histogram.counts
    shares = {name: [count / sum(counts) for count in counts] for name, counts in groups.items() if sum(counts)}
    across = Axis([*edges, *(mark.x for mark in marks)], LEFT, WIDTH - RIGHT, whole=whole)
    top = max((max(values) for values in shares.values()), default=1.0)
    up = Axis([0.0, 100 * top], HEIGHT - BOTTOM, TOP + LINE * len(marks))
    shapes = [_draw_axes(across, up, x_label, "share in %")]
    for number, values in enumerate(shares.values()):
        steps = [(edges[0], 0.0)]
        for at, value in enumerate(values):
            steps += [(edges[at], 100 * value), (edges[at + 1], 100 * value)]
        steps.append((edges[-1], 0.0))
        path = " ".join(f"{across.place(x)},{up.place(y)}" for x, y in steps)
        colour = number % COLOURS
        shapes.append(f'<polygon class="a{colour}" points="{path}"/><polyline class="l{colour}" points="{path}"/>')
    shapes += _draw_marks(marks, across)
    return _frame(shapes, title, list(shares))


def list_ticks(low: float, high: float, *, whole: bool = False, most: int = 6) -> list[float]:
    """Return at most `most` + 1 round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [at * step for at in range(first, last + 1)] or [low, high]


def format_number(value: float) -> str:
    """Return a number as people write it on an axis: no more digits than it needs, thousands set apart."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.4g}".replace("e-0", "e-")
    return "0" if float(text) == 0 else text.replace("-", "−")


def _draw_axes(across: Axis, up: Axis, x_label: str, y_label: str) -> str:
    shapes = []
    for value in up.ticks:
        y = up.place(value)
        shapes.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{format_number(value)}</text>')
    base = HEIGHT - BOTTOM
    for value in across.ticks:
        x = across.place(value)
        shapes.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>')
        shapes.append(f'<text x="{x}" y="{base + 17}" text-anchor="middle">{format_number(value)}</text>')
    shapes.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    shapes.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    height = (up.end + base) / 2
    shapes.append(
        f'<text x="13" y="{height}" text-anchor="middle" transform="rotate(-90 13 {height})">{escape(y_label)}</text>'
    )
    return "".join(shapes)


def _draw_marks(marks: Sequence[Mark], across: Axis) -> list[str]:
    """Return vertical rules, each with its label above the chart on a line of its own, since two may stand close."""
    shapes = []
    for number, mark in enumerate(marks):
        x, y = across.place(mark.x), TOP + LINE * number
        side, shift = ("end", -4) if x > WIDTH / 2 else ("start", 4)
        shapes.append(
            f'<line class="mark" x1="{x}" x2="{x}" y1="{y - 9}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="mark" x="{x + shift}" y="{y}" text-anchor="{side}">{escape(mark.label)}</text>'
        )
    return shapes


def _thin(line: Line) -> list[tuple[float, float]]:
    """Return the points that have a value; of very many, the means of as many neighbours as it takes."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
    size = math.ceil(len(points) / MOST_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _frame(shapes: Sequence[str], title: str, names: Sequence[str]) -> str:
    legend = "".join(
        f'<span><svg class="key" viewBox="0 0 22 10" aria-hidden="true">'
        f'<line class="l{number % COLOURS}" x1="1" x2="21" y1="5" y2="5"/></svg>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(shapes)}</svg>'
        + (f'<p class="legend">{legend}</p>' if len(names) > 1 else "")
        + "</figure>"
    )
