"""Reading rows of tables with many chunks: the right ones, for the price of those alone."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pairdr.formats import Examples, write_examples
from pairdr.records import Example
from pairdr.rows import RowReader


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_rows_are_found_in_any_order_and_twice(sizes: list[int], data: st.DataObject) -> None:
    count = sum(sizes)
    numbers, texts = np.arange(count), [f"t{number}" for number in range(count)]
    borders = np.cumsum([0, *sizes])
    tables = [
        pa.table({"number": pa.array(numbers[start:end]), "text": pa.array(texts[start:end], pa.string())})
        for start, end in pairwise(borders)
    ]
    rows = data.draw(st.lists(st.integers(0, count - 1), max_size=12)) if count else []
    reader = RowReader([pa.concat_tables(tables[:2]), *tables[2:]])
    assert reader.take(rows, ("text", "number")) == [(f"t{row}", row) for row in rows]
    assert reader.take(np.array(rows, dtype=np.int64), ("number",)) == [(row,) for row in rows]


def test_what_a_batch_costs_does_not_grow_with_the_examples(tmp_path: Path) -> None:
    peaks = []
    for count in (20_000, 100_000):
        path = tmp_path / f"{count}.arrow"
        rows = (Example(f"q{n}", f"p{n}", (f"n{n}",), (f"p{n}",), "labelled", 1.0, (0.5,)) for n in range(count))
        write_examples(path, rows)
        examples, usual = Examples.open(path), pa.default_memory_pool()
        pool = pa.proxy_memory_pool(usual)
        pa.set_memory_pool(pool)
        try:
            found = examples.take(range(0, count, count // 32))
            examples.keys(np.arange(0, count, count // 32))
        finally:
            pa.set_memory_pool(usual)
        peaks.append(pool.max_memory())
        assert [row.query_id for row in found] == [f"q{number}" for number in range(0, count, count // 32)]
    assert 0 < peaks[1] <= 2 * peaks[0]


def test_examples_are_left_out_by_a_mask(tmp_path: Path) -> None:
    path = tmp_path / "examples.arrow"
    write_examples(path, (Example(f"q{n}", "p", (), (), "labelled", 1.0, ()) for n in range(10)))
    kept = Examples.open(path).keep(np.arange(10) % 3 == 0)
    assert [row.query_id for row in kept] == ["q0", "q3", "q6", "q9"]
    assert [kept[at].query_id for at in (1, -1)] == ["q3", "q9"]
    assert [query_id for query_id, _ in kept.keep(np.array([False, True, True, False])).keys(np.array([1, 0]))] == [
        "q6",
        "q3",
    ]
    assert len(kept) == 4


def test_reading_rows_loads_no_pandas() -> None:
    """It takes a third of a second, which every search would wait for."""
    script = """
import sys
import numpy as np
import pyarrow as pa
from pairdr.rows import RowReader
column = pa.Array.from_buffers(pa.int64(), 3, [None, pa.py_buffer(np.array([3, 4, 5]))])  # pa.array loads pandas
reader = RowReader([pa.Table.from_arrays([column], ["a"])])
assert reader.take(np.array([2, 0]), ("a",)) == [(5,), (3,)]
assert "pandas" not in sys.modules
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
