"""Filters by metadata: which rows may be found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pairdr.errors import UsageError

Filters = Mapping[str, frozenset[str]]


def parse_filters(conditions: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return {field: values} of conditions like "language=en"; a field that is named twice may have either value.

    Raises:
        UsageError: a condition of another form.
    """
    wanted: dict[str, frozenset[str]] = {}
    for condition in conditions:
        field, equals, value = condition.partition("=")
        if not equals or not field:
            raise UsageError(f"{condition!r} is no filter.", remedy="Write FIELD=VALUE.")
        wanted[field] = wanted.get(field, frozenset()) | {value}
    return wanted


def match_rows(metadata: pa.ChunkedArray, filters: Filters) -> npt.NDArray[np.bool_]:
    """Return [N] which rows have one of the wanted values in every wanted field; of a list, any of its items counts.

    Numbers and true, false and null are written as in JSON; 1 is 1.0.

    Args:
        metadata: [N] JSON objects, or empty.
        filters: field to wanted values.

    Raises:
        UsageError: a field that no passage has, with those there are.
    """
    fields: set[str] = set()
    parts = [np.zeros(0, dtype=np.bool_)]
    for chunk in metadata.chunks:
        coded = chunk.dictionary_encode()  # most corpora have few different ones
        objects = [json.loads(text) if text else {} for text in coded.dictionary.to_pylist()]
        fields.update(*objects)
        verdicts = np.array([_matches(found, filters) for found in objects], dtype=np.bool_)
        parts.append(verdicts[coded.indices.to_numpy()])
    missing = sorted(set(filters) - fields)
    if missing:
        there = f"There are: {', '.join(sorted(fields))}." if fields else 'Give passages "metadata" in corpus.jsonl.'
        raise UsageError(f"No passage has the metadata field {missing[0]!r}.", remedy=there)
    return np.concatenate(parts)


def _matches(found: Mapping[str, Any], filters: Filters) -> bool:
    return all(field in found and not values.isdisjoint(write_forms(found[field])) for field, values in filters.items())


def write_forms(value: Any) -> list[str]:
    """Return every form in which a condition may name a value, or an item of a list."""
    return [text for item in (value if isinstance(value, list) else [value]) for text in _write_item(item)]


def _write_item(item: Any) -> list[str]:
    if isinstance(item, str):
        return [item]
    if type(item) is int:
        return [str(item), f"{item}.0"]
    if isinstance(item, float) and item.is_integer():
        return [str(int(item)), json.dumps(item)]
    return [json.dumps(item)]
