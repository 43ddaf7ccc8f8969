"""What an option is: a field with a default, a help text and a range. config.py and store_config.py define them all."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pairdr.errors import UsageError


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Define one option.

    Args:
        default: its value when nobody says otherwise.
        help: what it does, with its unit.
        low: the smallest value that makes sense.
        high: the largest one.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class Options:
    """Base of all option classes: checks ranges and choices when it is made.

    Raises:
        UsageError: a value outside its range or choices, naming the option and what it can be.
    """

    def __post_init__(self) -> None:
        """Check every value against its kind and its range or choices."""
        hints = _read_hints(type(self))  # type: ignore[arg-type]  # mypy knows no hash of classes
        for spec in fields(self):
            value, hint = getattr(self, spec.name), hints[spec.name]
            wanted, kinds = None, get_args(hint) or (hint,)
            if kinds == (int, ...):
                wanted = None if all(type(item) is int and item > 0 for item in value) else "whole numbers above 0"
            elif kinds == (str, ...) and spec.default:
                wanted = None if value else "at least one name"
            elif get_origin(hint) is Literal:
                wanted = None if value in kinds else f"one of {', '.join(kinds)}"
            elif value is not None and not {int, float}.isdisjoint(kinds):
                wanted = find_broken_range(value, spec.metadata.get("low"), spec.metadata.get("high"), float in kinds)
            if wanted is not None:
                raise UsageError(f"Option {spec.name} is {value!r}; it must be {wanted}.")

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def find_broken_range(value: Any, low: float | None, high: float | None, fractions: bool) -> str | None:
    """Return in words what a value has to be if it is no number, no whole one, or outside its range; else None."""
    if not isinstance(value, int | float) or (isinstance(value, float) and not fractions):
        return "a number" if fractions else "a whole number"
    if not math.isnan(value) and (low is None or value >= low) and (high is None or value <= high):
        return None
    if low is None and high is None:
        return "a number"
    return f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"


@cache  # a search makes several options
def _read_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
