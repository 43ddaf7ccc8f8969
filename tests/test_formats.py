"""The files that others make or read: what is written is read back, and what is broken is named by file and line."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairdr.errors import DataError, PairdrError, UsageError
from pairdr.formats import (
    EXAMPLE_SCHEMA,
    Examples,
    read_jsonl,
    read_lines,
    read_passages,
    read_qrels,
    read_run,
    read_texts,
    read_unlabelled,
    write_examples,
    write_qrels,
    write_run,
    write_trec_run,
)
from pairdr.records import Example, Run, Scored

# No white space, which parts the columns of a TREC run; no byte order mark, which is dropped at the start of a file.
WORDS = st.text(
    st.characters(exclude_categories=("Z", "C"), exclude_characters="\ufeff"), min_size=1, max_size=8
)  # fmt: skip
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def write_bytes(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_dict(run: Run) -> dict[str, list[Scored]]:
    return {query_id: run[query_id] for query_id in run}


def in_trec_order(ranked: dict[str, dict[str, float]]) -> dict[str, list[tuple[str, float]]]:
    return {query: sorted(hits.items(), key=lambda hit: (-hit[1], hit[0])) for query, hits in ranked.items()}


@given(st.dictionaries(WORDS, st.dictionaries(WORDS, st.integers(-2, 5), min_size=1), min_size=1))
def test_labels_are_read_as_they_were_written(tmp_path: Path, qrels: dict[str, dict[str, int]]) -> None:
    write_qrels(tmp_path / "dev.tsv", qrels)
    assert read_qrels(tmp_path / "dev.tsv") == qrels


@given(st.dictionaries(WORDS, st.dictionaries(WORDS, FLOATS, min_size=1), min_size=1))
def test_a_trec_run_is_read_as_it_was_written(tmp_path: Path, ranked: dict[str, dict[str, float]]) -> None:
    run = Run.from_mapping(in_trec_order(ranked))
    write_trec_run(tmp_path / "run.trec", run, "tag")
    assert as_dict(read_run(tmp_path / "run.trec")) == as_dict(run)


@given(st.lists(st.dictionaries(TEXTS, st.lists(st.tuples(TEXTS, FLOATS), max_size=4), max_size=4), max_size=3))
def test_an_arrow_run_is_read_as_its_blocks_were_written(
    tmp_path: Path, blocks: list[dict[str, list[tuple[str, float]]]]
) -> None:
    blocks = [{f"{number}{query}": hits for query, hits in block.items()} for number, block in enumerate(blocks)]
    with write_run(tmp_path / "run.arrow") as add:
        for block in blocks:
            add(list(block), [[Scored(*hit) for hit in hits] for hits in block.values()])
    joined = {query: [Scored(*hit) for hit in hits] for block in blocks for query, hits in block.items()}
    run = read_run(tmp_path / "run.arrow")
    assert as_dict(run) == joined
    assert run.count_hits() == sum(map(len, joined.values()))


@st.composite
def examples(draw: st.DrawFn) -> Example:
    negatives = tuple(draw(st.lists(TEXTS, max_size=3)))
    scores = draw(st.lists(FLOATS, min_size=len(negatives), max_size=len(negatives)))
    known = tuple(draw(st.lists(TEXTS, max_size=3)))
    source = draw(st.sampled_from(["labelled", "pseudo"]))
    return Example(draw(TEXTS), draw(TEXTS), negatives, known, source, draw(FLOATS), tuple(scores))


@given(st.lists(examples(), max_size=7))
def test_examples_are_read_as_they_were_written(tmp_path: Path, rows: list[Example]) -> None:
    assert write_examples(tmp_path / "rows.arrow", iter(rows), block=3) == len(rows)
    assert list(Examples.open(tmp_path / "rows.arrow")) == rows


def test_an_unscored_example_stays_unscored(tmp_path: Path) -> None:
    write_examples(tmp_path / "rows.arrow", [Example("q", "p", ("n",), ("p",), "labelled", math.nan, (math.nan,))])
    (row,) = Examples.open(tmp_path / "rows.arrow")
    assert math.isnan(row.positive_score)
    assert math.isnan(row.negative_scores[0])


def test_several_example_files_are_read_as_one_in_their_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_examples(tmp_path / name, [Example(name, "p", (), ("p",), "labelled", 1.0, ())])
    rows = Examples.open(tmp_path / "b", tmp_path / "a")
    assert [row.query_id for row in rows] == ["b", "a"]
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("plain.jsonl", lambda text: text.encode()),
        ("mark.jsonl", lambda text: text.encode("utf-8-sig")),
        ("windows.jsonl", lambda text: text.replace("\n", "\r\n").encode()),
        ("unended.jsonl", lambda text: text.rstrip("\n").encode()),
        ("spaced.jsonl", lambda text: text.replace("\n", "\n\n \n").encode()),
        ("packed.jsonl.gz", lambda text: gzip.compress(text.encode())),
        ("packed-mark.jsonl.gz", lambda text: gzip.compress(text.encode("utf-8-sig"))),
    ],
)
def test_texts_are_the_same_in_every_form_of_file(tmp_path: Path, name: str, encode: Callable[[str], bytes]) -> None:
    rows = [{"_id": "a", "text": "Æther"}, {"_id": "b", "text": "  two  "}]
    path = write_bytes(tmp_path / name, encode("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)))
    assert [row for _, row in read_texts(path, ("_id", "text"))] == [["a", "Æther"], ["b", "  two  "]]


def test_line_numbers_count_empty_lines(tmp_path: Path) -> None:
    assert list(read_lines(write_bytes(tmp_path / "x", "a\n\n\nb\n"))) == [(1, "a"), (4, "b")]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    assert list(read_lines(write_bytes(tmp_path / "x", "a\u2028b\x85c\n"))) == [(1, "a\u2028b\x85c")]


@pytest.mark.parametrize(
    "text",
    [
        "query-id\tcorpus-id\tscore\nq\tp\t1\nq\tr\t2\n",
        "q\tp\t1\nq\tr\t2\n",
        "q\t0\tp\t1\nq\t0\tr\t2\n",
        "q 0 p 1\nq 0 r 2\n",
        "\ufeffquery-id\tcorpus-id\tscore\r\nq\tp\t1\r\nq\tr\t2\r\n",
    ],
    ids=["beir", "no header", "trec by tab", "trec by blank", "windows"],
)
def test_labels_have_three_columns_or_trecs_four(tmp_path: Path, text: str) -> None:
    assert read_qrels(write_bytes(tmp_path / "dev.tsv", text)) == {"q": {"p": 1, "r": 2}}


@pytest.mark.parametrize("header", ["", "query-id\tcorpus-id\n"])
def test_labels_of_two_columns_are_all_relevant(tmp_path: Path, header: str) -> None:
    assert read_qrels(write_bytes(tmp_path / "dev.tsv", f"{header}1\t7\n1\t0\n")) == {"1": {"7": 1, "0": 1}}


def test_ids_in_labels_keep_their_blanks_and_zeros(tmp_path: Path) -> None:
    assert read_qrels(write_bytes(tmp_path / "dev.tsv", "q 1\t007\t1\n")) == {"q 1": {"007": 1}}


def test_a_trec_run_is_ordered_by_score_then_id_whatever_its_ranks_say(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "r", "q Q0 c 1 0.5 t\nq Q0 b 2 0.5 t\nq Q0 a 3 0.9 t\n")
    assert [hit.passage_id for hit in read_run(path)["q"]] == ["a", "b", "c"]


def test_a_gzipped_trec_run_is_read(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "r.trec.gz", gzip.compress(b"q Q0 a 1 0.5 t\n"))
    assert read_run(path)["q"] == [Scored("a", 0.5)]


def test_numbers_as_ids_become_strings_and_a_missing_title_is_empty(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "c.jsonl", '{"_id": 7, "text": "x"}\n{"_id": "8", "title": null, "text": "y"}\n')
    assert [row for _, row in read_texts(path, ("_id", "title", "text"))] == [["7", "", "x"], ["8", "", "y"]]


def test_metadata_becomes_json_with_sorted_keys(tmp_path: Path) -> None:
    more = [', "metadata": {"b": [1], "a": "é"}', ', "metadata": {}', ""]
    lines = [f'{{"_id": "{number}", "text": "x"{item}}}\n' for number, item in enumerate(more)]
    path = write_bytes(tmp_path / "c.jsonl", "".join(lines))
    assert [passage.metadata for passage in read_passages(path)] == ['{"a": "\\u00e9", "b": [1]}', "", ""]


@pytest.mark.parametrize("metadata", ['"en"', "[1]", "7"])
def test_metadata_that_is_no_object_is_refused(tmp_path: Path, metadata: str) -> None:
    path = write_bytes(tmp_path / "c.jsonl", f'{{"_id": "a", "text": "x", "metadata": {metadata}}}\n')
    with pytest.raises(DataError, match=r'c\.jsonl:1: "metadata" is no object'):
        list(read_passages(path))


def test_questions_without_ids_are_named_by_file_and_line(tmp_path: Path) -> None:
    plain = write_bytes(tmp_path / "more.txt", " what is it \n\nwho\n")
    lines = write_bytes(tmp_path / "more.jsonl", '{"text": "why"}\n{"_id": 3, "text": "how"}\n')
    assert list(read_unlabelled(plain)) == [(1, "more.txt:1", "what is it"), (3, "more.txt:3", "who")]
    assert list(read_unlabelled(lines)) == [(1, "more.jsonl:1", "why"), (2, "3", "how")]


def texts(path: Path) -> list[object]:
    return list(read_texts(path, ("_id", "title", "text")))


def lines(path: Path) -> list[object]:
    return list(read_lines(path))


def objects(path: Path) -> list[object]:
    return list(read_jsonl(path))


def questions(path: Path) -> list[object]:
    return list(read_unlabelled(path))


GOOD = b'{"_id": "a", "text": "x"}\n'
DEEP = b"[" * 200_000

BROKEN = {
    "broken json": (texts, "c.jsonl", GOOD + b'{"_id": "b", \n', 2, "Broken JSON"),
    "deep json": (objects, "c.jsonl", GOOD + DEEP, 2, "Broken JSON"),
    "json array": (texts, "c.jsonl", b"[1]\n", 1, "Not a JSON object"),
    "no utf-8": (texts, "c.jsonl", GOOD + GOOD + b'{"_id": "b", "text": "\xff"}\n', 3, "Not UTF-8 .byte 0xff"),
    "utf-16": (lines, "c.txt", "question".encode("utf-16"), 1, "Not UTF-8"),
    "nul": (texts, "c.jsonl", b'{"_id": "b", "text": "a\\u0000b"}\n', 1, "NUL"),
    "nul in an id": (texts, "c.jsonl", b'{"_id": "\\u0000", "text": "a"}\n', 1, '"_id" has a NUL'),
    "id with a tab": (texts, "c.jsonl", b'{"_id": "a\\tb", "text": "a"}\n', 1, '"_id" has a tab or a line break'),
    "lone surrogate": (texts, "c.jsonl", GOOD + b'{"_id": "b", "text": "\\ud800"}\n', 2, "half a surrogate pair"),
    "no text": (texts, "c.jsonl", b'{"_id": "b"}\n', 1, '"text" is missing'),
    "text is a number": (texts, "c.jsonl", b'{"_id": "b", "text": 5}\n', 1, '"text" is missing or is no string'),
    "no id": (texts, "c.jsonl", b'{"text": "b"}\n', 1, '"_id" is missing'),
    "empty id": (texts, "c.jsonl", b'{"_id": " ", "text": "b"}\n', 1, '"_id" is missing'),
    "id is true": (texts, "c.jsonl", b'{"_id": true, "text": "b"}\n', 1, '"_id" is missing'),
    "no gzip": (texts, "c.jsonl.gz", GOOD, 1, "gzip file is broken"),
    "damaged gzip": (
        texts, "c.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:10] + b"\xff" * 30, 1, "gzip file is broken",
    ),
    "question without text": (questions, "u.jsonl", b'{"_id": "b"}\n', 1, '"text" is missing'),
    "question with half an id": (questions, "u.jsonl", b'{"_id": "\\ud800", "text": "b"}\n', 1, '"_id" has half'),
    "question with a break in its id": (questions, "u.jsonl", b'{"_id": "a\\n", "text": "b"}\n', 1, '"_id" has a tab'),
    "question with a null id": (questions, "u.jsonl", b'{"_id": null, "text": "b"}\n', 1, '"_id" is no string'),
    "question with a nul": (questions, "u.txt", b"fine\na\0b\n", 2, "NUL"),
    "labels with words": (read_qrels, "q.tsv", b"query-id\tcorpus-id\tscore\nq\tp\tyes\n", 2, "Not a qrels line"),
    "labels with a fraction": (read_qrels, "q.tsv", b"q\tp\t0.5\n", 1, "Not a qrels line"),
    "labels beyond 32 bits": (read_qrels, "q.tsv", b"q\tp\t2147483647\nq\tr\t2147483648\n", 2, "Not a qrels line"),
    "labels of one column": (read_qrels, "q.tsv", b"q\n", 1, "Not a qrels line"),
    "labels of five columns": (read_qrels, "q.tsv", b"q\t0\tp\t1\t1\n", 1, "Not a qrels line"),
    "labels of mixed columns": (read_qrels, "q.tsv", b"q\tp\t1\nq\tr\n", 2, "Not a qrels line"),
    "run of five columns": (read_run, "r.trec", b"q Q0 p 1 0.5 t\nq Q0 p 1 0.5\n", 2, "Not a TREC run line"),
    "run with a word as score": (read_run, "r.trec", b"q Q0 p 1 high t\n", 1, "Not a TREC run line"),
    "run with nan": (read_run, "r.trec", b"q Q0 p 1 nan t\n", 1, "Not a TREC run line"),
    "passage twice": (
        read_run, "r.trec", b"q Q0 p 1 2 t\nz Q0 p 1 2 t\nq Q0 p 2 1 t\n", 3, "Passage p stands twice under query q",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path, case: str) -> None:
    read, name, content, line, message = BROKEN[case]
    path = write_bytes(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert caught.value.remedy


def test_a_cut_gzip_file_is_named_with_the_line_it_breaks_off_at(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "c.jsonl.gz", gzip.compress(GOOD * 99)[:-20])
    with pytest.raises(DataError, match=r"c\.jsonl\.gz:\d+: The gzip file is broken or cut off"):
        texts(path)


@pytest.mark.parametrize("read", [texts, lines, questions, read_qrels, read_run])
@pytest.mark.parametrize("name", ["absent.jsonl", "absent.jsonl.gz", "absent.arrow", "."])
def test_a_missing_file_is_a_usage_error_with_its_path(
    tmp_path: Path, read: Callable[[Path], object], name: str
) -> None:
    with pytest.raises(UsageError, match="There is no such file") as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")


def write_table(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("read", [read_run, Examples.open])
@pytest.mark.parametrize("content", [b"", b"query Q0", b"ARROW1\0\0" + b"\xff" * 64])
def test_what_is_no_arrow_file_is_refused_with_its_path(
    tmp_path: Path, read: Callable[[Path], object], content: bytes
) -> None:
    path = write_bytes(tmp_path / "x.arrow", content)
    with pytest.raises(DataError, match="in Arrow form") as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("read", [read_run, Examples.open])
def test_an_arrow_file_with_other_columns_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = write_table(tmp_path / "x.arrow", pa.table({"query_id": ["q"]}))
    with pytest.raises(DataError, match="other columns"):
        read(path)


def test_missing_examples_name_the_stage_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(PairdrError, match="Run pairdr label"):
        Examples.open(tmp_path / "absent.arrow")


def test_examples_have_the_columns_that_others_may_rely_on() -> None:
    assert EXAMPLE_SCHEMA.names == list(Example.__dataclass_fields__)
