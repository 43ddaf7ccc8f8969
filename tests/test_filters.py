"""Filters by metadata against reading every passage's own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairdr.errors import UsageError
from pairdr.filters import match_rows, parse_filters

VALUES = st.sampled_from(["en", "de", 1, 2.5, True, None, ["en", 1], []])
OBJECTS = st.dictionaries(st.sampled_from(["language", "year"]), VALUES, max_size=2)


def keep(*rows: dict[str, Any], chunks: int = 1) -> pa.ChunkedArray:
    texts = [json.dumps(row, sort_keys=True) if row else "" for row in rows]
    parts = [part.tolist() for part in np.array_split(np.array(texts, dtype=object), chunks)]
    return pa.chunked_array(parts, pa.large_string())


@given(
    st.lists(OBJECTS, min_size=1, max_size=20), st.integers(1, 3), st.sampled_from(["en", "1", "2.5", "true", "null"])
)
def test_rows_match_where_their_own_value_or_one_of_its_items_is_wanted(
    rows: list[dict[str, Any]], chunks: int, value: str
) -> None:
    def matches(row: dict[str, Any]) -> bool:
        found = row.get("language", ())
        items = found if isinstance(found, list | tuple) else [found]
        return value in [item if isinstance(item, str) else json.dumps(item) for item in items]

    column = keep({"language": "xx"}, *rows, chunks=chunks)
    found = match_rows(column, parse_filters([f"language={value}"]))
    assert found.tolist() == [False, *map(matches, rows)]


def test_all_fields_must_match_and_one_of_a_fields_values() -> None:
    column = keep({"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 1, "b": 2}, {"a": 1}, {})
    assert match_rows(column, parse_filters(["a=1", "b=1"])).tolist() == [True, False, False, False, False]
    assert match_rows(column, parse_filters(["a=1", "a=2", "b=1"])).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("number", ["1", "1.0"])
@pytest.mark.parametrize("wanted", ["1", "1.0"])
def test_a_whole_number_is_the_same_with_and_without_a_fraction(number: str, wanted: str) -> None:
    """A browser reads 1.0 and asks for 1."""
    metadata = pa.chunked_array([[f'{{"n": {number}}}', '{"n": 1.5}', '{"n": true}']], pa.large_string())
    assert match_rows(metadata, {"n": frozenset({wanted})}).tolist() == [True, False, False]


def test_a_value_may_hold_an_equals_sign_and_be_empty() -> None:
    assert parse_filters(["a=b=c", "d="]) == {"a": frozenset({"b=c"}), "d": frozenset({""})}


def test_a_field_that_no_passage_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"field 'langauge'\. There are: language, year"):
        match_rows(keep({"language": "en"}, {"year": 1}), parse_filters(["langauge=en"]))
    with pytest.raises(UsageError, match=r'Give passages "metadata"'):
        match_rows(keep({}, {}), parse_filters(["language=en"]))


@pytest.mark.parametrize("condition", ["language", "=en", ""])
def test_what_is_no_condition_is_refused(condition: str) -> None:
    with pytest.raises(UsageError, match=r"is no filter\. Write FIELD=VALUE"):
        parse_filters([condition])
