"""Rows of memory-mapped Arrow tables, in any order, for the price of the rows that are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class RowReader:
    """Reads rows by their numbers.

    Arrow's own `take` puts whole columns together first where a table has more than one chunk: time and memory of a
    few rows would grow with the table.
    """

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._chunks = [chunk for table in tables for chunk in table.to_batches()]
        self._starts = np.cumsum([0, *(chunk.num_rows for chunk in self._chunks)])

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64], names: Sequence[str]) -> list[tuple[Any, ...]]:
        """Return the values of some columns, of each row in the order in which they are asked for."""
        places = np.asarray(rows, dtype=np.int64)
        found: list[tuple[Any, ...]] = [()] * len(places)
        chunk_of = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(chunk_of).tolist():
            here = np.flatnonzero(chunk_of == number)
            # pa.array would load pandas, which takes a third of a second.
            inside = np.ascontiguousarray(places[here] - self._starts[number], dtype=np.int64)
            indices = pa.Array.from_buffers(pa.int64(), len(inside), [None, pa.py_buffer(inside)])
            part = self._chunks[number].select(names).take(indices)
            columns = (part.column(name).to_pylist() for name in names)
            for at, row in zip(here.tolist(), zip(*columns, strict=True), strict=True):
                found[at] = row
        return found
