"""Rows by their ids: a sorted array of 64-bit hashes beside a table, so that memory does not grow with its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

FILES = ("hashes", "rows", "rank")
Rows = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def hash_text(text: str) -> int:
    """Return a 64-bit hash, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def write_id_index(folder: Path, name: str, ids: pa.ChunkedArray, hashes: Hashes, live: Rows | None = None) -> None:
    """Write the index of a table's ids.

    Args:
        folder: where it is written, as `NAME.hashes.npy`, `NAME.rows.npy` and `NAME.rank.npy`.
        name: of the table.
        ids: [N].
        hashes: [N] `hash_text` of each id.
        live: the rows that can be found by their id, in order; None is all.
    """
    rows: Rows = np.arange(len(hashes), dtype=np.int64) if live is None else live
    order = np.argsort(hashes[rows], kind="stable")
    np.save(folder / f"{name}.hashes.npy", hashes[rows][order])
    np.save(folder / f"{name}.rows.npy", rows[order])
    rank = np.empty(len(hashes), dtype=np.int64)
    rank[pc.sort_indices(ids).to_numpy()] = np.arange(len(hashes))
    np.save(folder / f"{name}.rank.npy", rank)


class IdIndex:
    """Finds rows by id: hashes are searched, then the id itself is compared.

    Attributes:
        rank: [N] place of each row's id in the order of all ids.
    """

    def __init__(self, folder: Path, name: str, ids: pa.ChunkedArray) -> None:
        self._hashes, self._rows, self.rank = (
            np.load(folder / f"{name}.{file}.npy", mmap_mode="r", allow_pickle=False) for file in FILES
        )
        self._ids = ids

    def find_row(self, text_id: str) -> int | None:
        """Return the first row of an id, or None."""
        row = int(self.find_rows([text_id])[0])
        return None if row < 0 else row

    def find_rows(self, text_ids: Sequence[str]) -> Rows:
        """Return the first row of each id [n], -1 where there is none."""
        keys = np.fromiter(map(hash_text, text_ids), dtype=np.uint64, count=len(text_ids))
        found: Rows = np.full(len(keys), -1, dtype=np.int64)
        for at, place in enumerate(np.searchsorted(self._hashes, keys).tolist()):
            while place < len(self._hashes) and self._hashes[place] == keys[at]:
                if str(self._ids[int(self._rows[place])]) == text_ids[at]:
                    found[at] = self._rows[place]
                    break
                place += 1
        return found
