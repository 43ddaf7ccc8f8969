"""Tables of texts with an id each, on the disk: written a block at a time, memory-mapped, found by id."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pairdr.config import OnDuplicate
from pairdr.errors import DataError
from pairdr.ids import IdIndex, hash_text, write_id_index
from pairdr.rows import RowReader

BLOCK = 8192


class TextTable:
    """A memory-mapped table of texts with an id each.

    Looking up an id reads a sorted array of 64-bit hashes and then compares the id itself, so memory does not grow
    with the number of rows.
    """

    def __init__(self, folder: Path, name: str) -> None:
        with pa.memory_map(str(folder / f"{name}.arrow")) as source:
            self.table: pa.Table = pa.ipc.open_file(source).read_all()
        self._index = IdIndex(folder, name, self.table.column("id"))
        self._rows = RowReader([self.table])
        self.id_rank: npt.NDArray[np.int64] = self._index.rank

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __contains__(self, text_id: str) -> bool:
        return self.find_row(text_id) is not None

    def id_of(self, row: int) -> str:
        """Return the id of a row."""
        return str(self.table.column("id")[int(row)].as_py())

    def take(self, rows: npt.NDArray[np.int64], columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
        """Return some columns of rows."""
        return self._rows.take(rows, columns)

    def ids_of(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Return the ids of many rows."""
        return [str(row[0]) for row in self._rows.take(rows, ("id",))]

    def find_row(self, text_id: str) -> int | None:
        """Return the row of an id, or None."""
        return self._index.find_row(text_id)

    def row_of(self, text_id: str) -> int:
        """Return the row of an id.

        Raises:
            DataError: no such id.
        """
        row = self.find_row(text_id)
        if row is None:
            raise DataError(f"There is no id {text_id!r} in this collection.", remedy="Check where the id comes from.")
        return row

    def read_blocks(self, columns: tuple[str, ...], size: int = BLOCK) -> Iterator[list[tuple[Any, ...]]]:
        """Yield rows in order, a block at a time."""
        for start in range(0, len(self), size):
            part = self.table.slice(start, size)
            yield list(zip(*(part.column(name).to_pylist() for name in columns), strict=True))


def write_table(
    folder: Path, name: str, columns: tuple[str, ...], rows: Iterable[tuple[int, list[str]]], on_duplicate: OnDuplicate
) -> list[str]:
    """Write one table with its id index; return the ids that occur twice."""
    schema = pa.schema([*((column, pa.large_string()) for column in columns)])
    hashes = array("Q")
    path = folder / f"{name}.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:

        def flush(block: list[list[str]]) -> None:
            arrays = [pa.array(list(column), pa.large_string()) for column in zip(*block, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))

        _in_blocks((row for _, row in rows), flush, hashes)
    keys = np.array(hashes, dtype=np.uint64)
    duplicates = _find_duplicates(_map_ids(path), keys)
    if duplicates and on_duplicate != "error":
        keys = keys[_keep_one(path, duplicates, on_duplicate)]
    write_id_index(folder, name, _map_ids(path), keys)
    return duplicates


def _keep_one(path: Path, duplicates: list[str], on_duplicate: OnDuplicate) -> npt.NDArray[np.bool_]:
    """Write a table anew with one row of each id, the first or the last; return which rows stay."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        keep = np.ones(table.num_rows, dtype=np.bool_)
        twice = np.flatnonzero(pc.is_in(table["id"], pa.array(duplicates, pa.large_string())))
        chosen: dict[str, int] = {}
        for row in twice.tolist() if on_duplicate == "last" else twice[::-1].tolist():
            chosen[str(table["id"][row])] = row
        keep[twice] = np.isin(twice, list(chosen.values()))
        with pa.OSFile(f"{path}.new", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            start = 0
            for batch in table.to_batches():
                writer.write_batch(batch.filter(pa.array(keep[start : start + batch.num_rows])))
                start += batch.num_rows
    Path(f"{path}.new").replace(path)
    return keep


def _map_ids(path: Path) -> pa.ChunkedArray:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all().column("id")


def _in_blocks(rows: Iterable[list[str]], flush: Callable[[list[list[str]]], None], hashes: array[int]) -> None:
    block: list[list[str]] = []
    for row in rows:
        hashes.append(hash_text(row[0]))
        block.append(row)
        if len(block) == BLOCK:
            flush(block)
            block = []
    if block:
        flush(block)


def _find_duplicates(ids: pa.ChunkedArray, keys: npt.NDArray[np.uint64]) -> list[str]:
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    pairs = ((str(ids[int(order[i])]), str(ids[int(order[i + 1])])) for i in same)
    return sorted({first for first, second in pairs if first == second})
