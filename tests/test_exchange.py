"""Data of other tools: what is written is read back, what is broken is named, and training runs on what was read."""

from __future__ import annotations

import gzip
import json
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairdr.answers import read_answers
from pairdr.artefact import publish, read_manifest
from pairdr.cli import main
from pairdr.collection import open_collection
from pairdr.config import DataConfig
from pairdr.errors import ArtefactError, DataError, PairdrError, UsageError
from pairdr.exchange import files
from pairdr.exchange.corpora import (
    CorpusWriter,
    read_corpus,
    write_candidate_pool,
    write_collection,
    write_paragraphs,
    write_psgs,
    write_tevatron_corpus,
    write_tevatron_old_corpus,
)
from pairdr.exchange.exports import export_data
from pairdr.exchange.files import CHANGED, read_objects, read_quoted_columns
from pairdr.exchange.imports import import_data, parse_sources
from pairdr.exchange.training import (
    ROWS,
    UNPAIRED,
    Candidate,
    TrainingRow,
    read_dpr,
    read_flagembedding,
    read_rocketqa,
    read_tevatron,
    write_dpr,
    write_flagembedding,
    write_rocketqa,
    write_rocketqa_cross,
    write_tevatron,
    write_tevatron_old,
)
from pairdr.formats import Examples, write_examples
from pairdr.lines import read_jsonl
from pairdr.records import Example, Passage, Query
from pairdr.store_config import ExportDataConfig, ImportDataConfig

if TYPE_CHECKING:
    from conftest import WriteBeir

# No byte order mark, which is dropped at the start of a file; no NUL and no lone surrogate, which nothing can store.
TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\ufeff"), max_size=12)
IDS = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)
SCORES = st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def training_rows(draw: st.DrawFn) -> list[TrainingRow]:
    """Return rows in which an id, and a passage's words within a row, stand once."""
    scored = draw(st.booleans())

    def draw_side(name: str, least: int) -> tuple[Candidate, ...]:
        texts = draw(st.lists(st.tuples(TEXTS, TEXTS, SCORES), min_size=least, max_size=3))
        return tuple(
            Candidate(f"{name}{n}", title, f"{name}{n} {text}", score if scored and score is not None else math.nan)
            for n, (title, text, score) in enumerate(texts)
        )

    return [
        TrainingRow(
            Query(f"q{n}", f"{n} {draw(TEXTS)}"),
            draw_side(f"{n}p", 1),
            draw_side(f"{n}n", 0),
            tuple(draw(st.lists(TEXTS, max_size=2))),
        )
        for n in range(draw(st.integers(0, 3)))
    ]


@st.composite
def passages(draw: st.DrawFn) -> list[Passage]:
    ids = draw(st.lists(IDS.filter(lambda text: text != "id"), max_size=4, unique=True))
    return [Passage(passage_id, draw(TEXTS.filter(lambda text: text != "-")), draw(TEXTS)) for passage_id in ids]


def comparable(rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Return rows whose missing scores are equal: NaN is not equal to itself."""

    def settle(side: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        return tuple(found._replace(score=None if math.isnan(found.score) else found.score) for found in side)

    return [replace(row, positives=settle(row.positives), negatives=settle(row.negatives)) for row in rows]


def write_and_read(path: Path, rows: list[TrainingRow], write: Callable[..., None], read: Callable[..., Any]) -> Any:
    counts: Counter[str] = Counter()
    write(path, iter(rows), counts)
    return [row for _, row in read(path)], counts


def flat(text: str) -> str:
    return text.replace("\t", " ").replace("\n", " ").replace("\r", " ")


def flat_title(title: str) -> str:
    return "" if flat(title) == "-" else flat(title)


def flat_side(side: Sequence[Candidate]) -> tuple[Candidate, ...]:
    return tuple(Candidate("", flat_title(found.title), flat(found.text or "")) for found in side)


def write_text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_rows(path: Path, *values: dict[str, Any]) -> Path:
    return write_text(path, *map(json.dumps, values))


def read_lines_of(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\n")[:-1]


def read_examples(folder: Path, name: str = "labelled") -> list[Example]:
    return list(Examples.open(folder / f"{name}.arrow"))


def run_import(source_format: str, output: Path, *sources: Path | tuple[str, Path], **options: Any) -> dict[str, Any]:
    """Import files, those without a split for training."""
    named = [source if isinstance(source, tuple) else ("train", source) for source in sources]
    data, config = options.pop("data", DataConfig()), ImportDataConfig(scores=options.pop("scores", "auto"))
    return import_data(named, source_format, data, config, output, **options)  # type: ignore[arg-type]


def run_export(target: str, data: Path, output: Path, examples: Path | None = None, **options: Any) -> dict[str, Any]:
    return export_data(open_collection(data), target, ExportDataConfig(**options), output, examples)  # type: ignore[arg-type]


# --- training files, written and read ---------------------------------------------------------------------------------


@given(training_rows())
def test_dpr_is_read_as_it_was_written(tmp_path: Path, rows: list[TrainingRow]) -> None:
    found, counts = write_and_read(tmp_path / "train.json", rows, write_dpr, read_dpr)
    assert comparable(found) == comparable(rows)
    assert counts[ROWS] == len(rows)
    assert json.loads((tmp_path / "train.json").read_text(encoding="utf-8")) is not None


@given(training_rows())
def test_tevatrons_old_keys_are_read_as_they_were_written(tmp_path: Path, rows: list[TrainingRow]) -> None:
    found, counts = write_and_read(tmp_path / "train.jsonl", rows, write_tevatron_old, read_tevatron)
    assert comparable(found) == comparable(rows)
    assert counts[ROWS] == len(rows)


@given(training_rows())
def test_tevatrons_new_keys_name_passages_by_id(tmp_path: Path, rows: list[TrainingRow]) -> None:
    def name(side: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        return tuple(Candidate(found.passage_id, "", None) for found in side)

    found, _ = write_and_read(tmp_path / "train.jsonl", rows, write_tevatron, read_tevatron)
    wanted = [TrainingRow(row.query, name(row.positives), name(row.negatives)) for row in rows]
    assert comparable(found) == comparable(wanted)


@given(training_rows())
def test_flagembedding_keeps_joined_texts_and_whole_lists_of_scores(tmp_path: Path, rows: list[TrainingRow]) -> None:
    def join(side: tuple[Candidate, ...], scored: bool) -> tuple[Candidate, ...]:
        return tuple(Candidate("", "", found.joined, found.score if scored else math.nan) for found in side)

    found, _ = write_and_read(tmp_path / "train.jsonl", rows, write_flagembedding, read_flagembedding)
    wanted = []
    for row in rows:
        scored = not any(math.isnan(found.score) for found in (*row.positives, *row.negatives))
        query = Query("", row.query.text)
        wanted.append(TrainingRow(query, join(row.positives, scored), join(row.negatives, scored)))
    assert comparable(found) == comparable(wanted)


@given(training_rows())
def test_rocketqas_dual_form_keeps_each_positive_with_its_negatives(tmp_path: Path, rows: list[TrainingRow]) -> None:
    found, counts = write_and_read(tmp_path / "train.tsv", rows, write_rocketqa, read_rocketqa)
    wanted = [
        TrainingRow(Query("", flat(row.query.text)), flat_side([positive]), flat_side(row.negatives))
        for row in rows
        if row.negatives
        for positive in row.positives
    ]
    assert comparable(found) == comparable(wanted)
    assert counts[UNPAIRED] == sum(not row.negatives for row in rows)
    assert all(line.count("\t") == 5 and line.endswith("\t0") for line in read_lines_of(tmp_path / "train.tsv"))


@given(training_rows())
def test_rocketqas_cross_form_keeps_every_passage_with_its_label(tmp_path: Path, rows: list[TrainingRow]) -> None:
    found, _ = write_and_read(tmp_path / "train.tsv", rows, write_rocketqa_cross, read_rocketqa)
    wanted = [
        TrainingRow(Query("", flat(row.query.text)), flat_side(row.positives), flat_side(row.negatives)) for row in rows
    ]
    assert comparable(found) == comparable(wanted)


def test_changed_texts_are_counted(tmp_path: Path) -> None:
    rows = [TrainingRow(Query("q", "a\tb"), (Candidate("p", "", "c\nd"),), (Candidate("n", "", "e"),))]
    _, counts = write_and_read(tmp_path / "train.tsv", rows, write_rocketqa, read_rocketqa)
    assert counts[CHANGED] == 2
    assert read_lines_of(tmp_path / "train.tsv") == ["a b\t-\tc d\t-\te\t0"]


def test_lines_of_one_query_that_stand_apart_are_rows_of_their_own(tmp_path: Path) -> None:
    lines = ("q\t-\tp1\t-\tn1\t0", "q\t-\tp1\t-\tn2\t0", "r\t-\tp2\t-\tn1\t0", "q\t-\tp1\t-\tn3\t0")
    found = list(read_rocketqa(write_text(tmp_path / "train.tsv", *lines)))
    assert [line for line, _ in found] == [1, 3, 4]
    assert [[negative.text for negative in row.negatives] for _, row in found] == [["n1", "n2"], ["n1"], ["n3"]]


# --- collections ------------------------------------------------------------------------------------------------------


CORPORA: list[tuple[CorpusWriter, str, Callable[[Passage], Passage]]] = [
    (write_collection, "collection.tsv", lambda p: Passage(p.passage_id, "", flat(p.joined))),
    (write_paragraphs, "para.txt", lambda p: Passage(p.passage_id, flat_title(p.title), flat(p.text))),
    (write_psgs, "psgs_w100.tsv", lambda p: Passage(p.passage_id, flat(p.title), flat(p.text))),
    (write_tevatron_corpus, "corpus.jsonl", lambda p: Passage(p.passage_id, "", p.joined)),
    (write_tevatron_old_corpus, "corpus.jsonl", lambda p: p),
]


@pytest.mark.parametrize(("write", "name", "change"), CORPORA, ids=[write.__name__ for write, _, _ in CORPORA])
@given(corpus=passages())
def test_a_corpus_is_read_as_it_was_written(
    tmp_path: Path, write: CorpusWriter, name: str, change: Callable[[Passage], Passage], corpus: list[Passage]
) -> None:
    write(tmp_path, iter(corpus), Counter())
    titles = tmp_path / "para.title.txt"
    found = read_corpus(tmp_path / name, titles if name == "para.txt" else None)
    assert [passage for _, passage in found] == [change(passage) for passage in corpus]


@given(passages())
def test_the_pool_of_flagembeddings_miner_holds_every_text(tmp_path: Path, corpus: list[Passage]) -> None:
    write_candidate_pool(tmp_path, iter(corpus), Counter())
    found = [value for _, value in read_jsonl(tmp_path / "candidate_pool.jsonl")]
    assert found == [{"text": passage.joined} for passage in corpus]


def test_tevatrons_corpus_has_both_names_of_the_text(tmp_path: Path) -> None:
    write_tevatron_corpus(tmp_path, [Passage("1", "Lune", "A river.")], Counter())
    (line,) = read_lines_of(tmp_path / "corpus.jsonl")
    assert json.loads(line) == {"docid": "1", "text": "Lune A river.", "document_text": "Lune A river."}
    path = write_rows(tmp_path / "other.jsonl", {"docid": 1, "document_text": "A river."})
    assert list(read_corpus(path)) == [(1, Passage("1", "", "A river."))]


def test_a_corpus_may_have_titles_between_ids_and_texts(tmp_path: Path) -> None:
    path = write_text(tmp_path / "corpus.tsv", "1\tLune\tA river.", "2\t-\tA market.", "3\t\tA bridge.")
    found = [passage for _, passage in read_corpus(path)]
    assert found == [Passage("1", "Lune", "A river."), Passage("2", "", "A market."), Passage("3", "", "A bridge.")]


def test_a_passage_may_have_no_title(tmp_path: Path) -> None:
    texts = write_text(tmp_path / "para.txt", "0\ta", "1\tb", "2\tc")
    titles = write_text(tmp_path / "para.title.txt", "1\tB")
    assert [passage.title for _, passage in read_corpus(texts, titles)] == ["", "B", ""]


@pytest.mark.parametrize("lines", [("1\tB", "0\tA"), ("0\tA", "7\tG")])
def test_titles_in_another_order_are_refused(tmp_path: Path, lines: tuple[str, str]) -> None:
    texts, titles = (
        write_text(tmp_path / "para.txt", "0\ta", "1\tb"),
        write_text(tmp_path / "para.title.txt", *lines),
    )
    with pytest.raises(DataError, match=r"Passage [07] is not in para.txt, or not in this order") as error:
        list(read_corpus(texts, titles))
    assert (error.value.path, error.value.line) == (titles, 2)


def test_quoted_columns_may_have_line_breaks_and_long_texts(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.tsv", '1\t"a ""b""', 'c"\tT', f"2\t{'x' * 200_000}\tU")
    lines, columns = zip(*read_quoted_columns(path, 3), strict=True)
    assert lines == (2, 3)
    assert columns == (["1", 'a "b"\nc', "T"], ["2", "x" * 200_000, "U"])


# --- one large array --------------------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(TEXTS, JSON, max_size=3), max_size=4), st.sampled_from([None, 0, 3]), st.integers(1, 9))
def test_an_array_is_read_as_json_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[dict[str, Any]], indent: int | None, chunk: int
) -> None:
    monkeypatch.setattr(files, "_CHUNK", chunk)
    text = " \n" + json.dumps(values, indent=indent, ensure_ascii=indent is None) + "\n"
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = list(read_objects(tmp_path / "a.json"))
    assert [one.value for one in found] == values
    lines = text.split("\n")
    assert all("{" in lines[one.line - 1] for one in found)
    assert [one.line for one in found] == sorted(one.line for one in found)


@given(st.lists(st.dictionaries(TEXTS, JSON, min_size=1, max_size=2), min_size=1, max_size=2), st.data())
def test_an_array_that_is_cut_off_is_refused_wherever_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[dict[str, Any]], data: st.DataObject
) -> None:
    monkeypatch.setattr(files, "_CHUNK", 5)
    text = json.dumps(values)
    path = tmp_path / "a.json"
    path.write_text(text[: data.draw(st.integers(1, len(text) - 1))], encoding="utf-8")
    with pytest.raises(DataError, match="Broken JSON") as error:
        list(read_objects(path))
    assert (error.value.path, error.value.line) == (path, 1)


def test_a_byte_order_mark_before_an_array_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('\ufeff[{"a": 1}]'.encode())
    assert [one.value for one in read_objects(path)] == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[\n{"a": 1}\n{"a": 2}]', 3, "no comma between objects"),
        ('[\n{"a": 1},\n]', 3, "a comma without an object after it"),
        ('[\n{"a": 1}\n]\n[]', 4, "more than one array"),
        ('[\n{"a": 1},\n{"a" 1}\n]', 3, "Expecting ':' delimiter"),
        ('[\n{"a": 1,\n"b": "x\ny"}]', 3, "Invalid control character"),
        ('[\n{"a": 1},\n7]', 3, "Not a JSON object"),
        ("[" * 100_000, 1, "recursion"),
        ('[{"a": ' + "9" * 5000 + "}]", 1, "digits"),
    ],
)
def test_a_broken_array_is_named_by_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text + " " * 20, encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        list(read_objects(path))
    assert (error.value.path, error.value.line) == (path, line)


def test_an_array_of_other_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[\n{"a": "caf\xe9"}]')
    with pytest.raises(DataError, match="Not UTF-8"):
        list(read_objects(path))
    whole = gzip.compress(json.dumps([{"a": list(range(20_000))}]).encode())
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(whole)
    assert [one.value["a"][-1] for one in read_objects(packed)] == [19_999]
    packed.write_bytes(whole[:-20])
    with pytest.raises(DataError, match="gzip file is broken or cut off"):
        list(read_objects(packed))
    packed.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match="gzip file is broken or cut off"):
        list(read_objects(packed))


def test_a_large_array_is_never_wholly_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 1 << 16)
    path = tmp_path / "a.json"
    with path.open("w", encoding="utf-8") as stream:
        stream.write("[" + ",".join(json.dumps({"text": f"{n} " + "word " * 200}) for n in range(8000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_objects(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000
    assert path.stat().st_size > 8_000_000
    assert peak < 1_000_000


# --- broken training files --------------------------------------------------------------------------------------------

GOOD: dict[str, tuple[str, str]] = {
    "dpr": ("train.jsonl", '{"question": "q", "positive_ctxs": [{"title": "T", "text": "p", "passage_id": "1"}]}'),
    "tevatron": ("train.jsonl", '{"query_id": "1", "query": "q", "positive_passages": [{"docid": "1", "text": "p"}]}'),
    "flagembedding": ("train.jsonl", '{"query": "q", "pos": ["p"], "neg": ["n"]}'),
    "rocketqa": ("train.tsv", "q\tT\tp\tT\tn\t0"),
}


@pytest.mark.parametrize(
    ("source_format", "broken", "message"),
    [
        ("dpr", '{"question": "q"', "Broken JSON"),
        ("dpr", "[1]", "Not a JSON object"),
        ("dpr", '{"positive_ctxs": []}', '"question" is missing or is no string'),
        ("dpr", '{"question": "q"}', '"positive_ctxs" is missing or is no list'),
        ("dpr", '{"question": "q", "positive_ctxs": ["p"]}', '"positive_ctxs" has an item that is no object'),
        ("dpr", '{"question": "q", "positive_ctxs": [{"title": "T"}]}', '"text" is missing or is no string'),
        ("dpr", '{"question": "q", "positive_ctxs": [{"text": "p", "passage_id": 1.5}]}', '"docid" is no string'),
        ("dpr", '{"question": "q", "positive_ctxs": [{"text": "p", "id": "a\\tb"}]}', "has a tab or a line break"),
        ("dpr", '{"question": "q", "positive_ctxs": [{"text": "p", "score": "high"}]}', "'high', no finite number"),
        ("dpr", '{"question": "q", "positive_ctxs": [{"text": "p", "score": 1e39}]}', "no finite number of 32 bits"),
        ("dpr", '{"question": "q", "positive_ctxs": [{"text": "p", "score": true}]}', "no finite number"),
        ("dpr", '{"question": "q", "positive_ctxs": [{"text": "p", "score": Infinity}]}', "no finite number"),
        ("dpr", '{"question": "q\\u0000", "positive_ctxs": []}', '"question" has a NUL character'),
        ("dpr", '{"question": "q\\ud800", "positive_ctxs": []}', '"question" has half a surrogate pair'),
        ("tevatron", '{"query_id": "1", "positive_passages": []}', '"query_text" is missing or is no string'),
        ("tevatron", '{"query_id": "1", "query": "q"}', '"positive_passages" is missing or is no list'),
        (
            "tevatron",
            '{"query_text": "q", "positive_document_ids": "1"}',
            '"positive_document_ids" is missing or is no',
        ),
        ("tevatron", '{"query_text": "q", "positive_document_ids": ["9"]}', "There is no text for passage 9"),
        ("flagembedding", '{"query": "q"}', '"pos" is missing or is no list'),
        ("flagembedding", '{"query": "q", "pos": [1]}', '"pos" is missing or is no string'),
        (
            "flagembedding",
            '{"query": "q", "pos": ["p"], "pos_scores": [1, 2]}',
            '"pos_scores" has 2 scores for 1 texts',
        ),
        ("rocketqa", "q\tT\tp\tT\tn", "5 columns; expected query, title, text, title, text, 0"),
        ("rocketqa", "q\tT\tp\t1", "4 columns; expected"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path, source_format: str, broken: str, message: str) -> None:
    name, good = GOOD[source_format]
    path = write_text(tmp_path / name, good, "", broken)
    with pytest.raises(DataError, match=message) as error:
        run_import(source_format, tmp_path / "data", path)
    assert (error.value.path, error.value.line) == (path, 3)
    assert not (tmp_path / "data").exists()


def test_a_label_of_the_cross_form_is_1_or_0(tmp_path: Path) -> None:
    path = write_text(tmp_path / "train.tsv", "q\t\tp\t1", "q\t\tn\t0.5")
    with pytest.raises(DataError, match=r"'0.5' is no label") as error:
        list(read_rocketqa(path))
    assert error.value.line == 2


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("c.tsv", ("1\ta", "2"), "1 columns; expected id, text"),
        ("c.tsv", ("1\ta", " \tb"), "The id is blank"),
        ("c.tsv", ("id\ttext\ttitle", "1\ta"), "2 columns, not 3"),
        ("c.jsonl", ('{"docid": "1", "text": "a"}', '{"text": "b"}'), '"docid" is missing'),
        ("c.jsonl", ('{"docid": "1", "text": "a"}', '{"docid": "2"}'), '"text" is missing'),
    ],
)
def test_a_broken_corpus_is_named_by_file_and_line(
    tmp_path: Path, name: str, lines: tuple[str, ...], message: str
) -> None:
    path = write_text(tmp_path / name, *lines)
    with pytest.raises(DataError, match=message) as error:
        list(read_corpus(path))
    assert (error.value.path, error.value.line) == (path, 2)


def test_quotes_that_are_never_closed_are_named(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.tsv", "id\ttext\ttitle", '1\t"a\tT', *("x" * 1000 for _ in range(17_000)))
    with pytest.raises(DataError, match=r"Broken columns: .*Close the quotes"):
        list(read_corpus(path))


# --- into a BEIR folder -----------------------------------------------------------------------------------------------


def context(text: str, passage_id: Any = None, **more: Any) -> dict[str, Any]:
    return {"title": "T", "text": text} | ({} if passage_id is None else {"passage_id": passage_id}) | more


def test_dpr_becomes_a_beir_folder_with_examples(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"q{n}",
            "answers": [f"a{n}"],
            "positive_ctxs": [context(f"p{n}", n, score=1000)],
            "hard_negative_ctxs": [context(f"n{n}", f"{n}n", score="12.5"), context(f"p{n}", n, score=3.0)],
            "negative_ctxs": [context(f"e{n}", psg_id=f"{n}e")],
        }
        for n in range(3)
    ]
    rows[2]["hard_negative_ctxs"] = []
    train, dev = tmp_path / "train.json", tmp_path / "dev.json"
    train.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    dev.write_text(json.dumps([{"question": "d", "positive_ctxs": [context("p0", 0)]}]), encoding="utf-8")
    facts = run_import("dpr", tmp_path / "nq", train, ("dev", dev))
    collection = open_collection(tmp_path / "nq")
    ids = {query.text: query.query_id for query in map(collection.query, ids_of(tmp_path / "nq" / "queries.jsonl"))}
    assert set(ids) == {"q0", "q1", "q2", "d"}
    assert collection.qrels("train") == {ids[f"q{n}"]: {str(n): 1} for n in range(3)}
    assert collection.qrels("dev") == {ids["d"]: {"0": 1}}
    assert ids_of(tmp_path / "nq" / "corpus.jsonl") == ["0", "0n", "0e", "1", "1n", "1e", "2", "2e"]
    assert read_answers(tmp_path / "nq" / "answers.jsonl") == {ids[f"q{n}"]: (f"a{n}",) for n in range(3)}
    examples = read_examples(tmp_path / "nq.examples")
    assert [(row.positive_id, row.negative_ids) for row in examples] == [("0", ("0n",)), ("1", ("1n",)), ("2", ("2e",))]
    assert all(math.isnan(row.positive_score) and math.isnan(row.negative_scores[0]) for row in examples)
    assert facts["negatives that are positives, or held out"] == 2
    assert (facts["passages"], facts["queries"], facts["train queries"], facts["examples"]) == (8, 4, 3, 3)


def ids_of(path: Path) -> list[str]:
    return [value["_id"] for _, value in read_jsonl(path)]


@pytest.mark.parametrize(
    ("source_format", "scores", "kept"),
    [("dpr", "auto", False), ("dpr", "keep", True), ("tevatron", "auto", True), ("tevatron", "drop", False)],
)
def test_scores_count_as_a_teachers_where_they_can_be_its(
    tmp_path: Path, source_format: str, scores: str, kept: bool
) -> None:
    sides = {"dpr": ("positive_ctxs", "hard_negative_ctxs"), "tevatron": ("positive_passages", "negative_passages")}
    passages_of = dict(zip(sides[source_format], ([context("p", 1, score=0.75)], [context("n", 2)]), strict=True))
    words = {"question" if source_format == "dpr" else "query": "q"}
    run_import(source_format, tmp_path / "data", write_rows(tmp_path / "t.jsonl", words | passages_of), scores=scores)
    (row,) = read_examples(tmp_path / "data.examples")
    assert row.positive_score == 0.75 if kept else math.isnan(row.positive_score)
    assert math.isnan(row.negative_scores[0])
    (plain,) = read_examples(tmp_path / "data.examples", "plain")
    assert math.isnan(plain.positive_score)
    assert plain.negative_ids == row.negative_ids == ("2",)
    assert read_examples(tmp_path / "data.examples", "pseudo") == []


def test_texts_without_ids_get_the_same_ids_everywhere(tmp_path: Path) -> None:
    pair = {"query": "q", "pos": ["A river."], "neg": ["A market."]}
    run_import(
        "flagembedding", tmp_path / "flag", write_rows(tmp_path / "f.jsonl", pair, pair | {"neg": ["A bridge."]})
    )
    run_import("rocketqa", tmp_path / "rocket", write_text(tmp_path / "r.tsv", "q\t-\tA river.\t\tA market.\t0"))
    flag, rocket = (ids_of(tmp_path / name / "corpus.jsonl") for name in ("flag", "rocket"))
    assert flag[:2] == rocket
    assert len(set(flag)) == 3
    assert ids_of(tmp_path / "flag" / "queries.jsonl") == ids_of(tmp_path / "rocket" / "queries.jsonl")
    assert [row.negative_ids for row in read_examples(tmp_path / "flag.examples")] == [(flag[1],), (flag[2],)]


def test_a_title_is_part_of_what_makes_an_id(tmp_path: Path) -> None:
    path = write_text(tmp_path / "r.tsv", "q\tA\ttext\tB\ttext\t0")
    run_import("rocketqa", tmp_path / "data", path)
    assert len(set(ids_of(tmp_path / "data" / "corpus.jsonl"))) == 2


def test_negatives_of_a_query_whose_positive_stands_elsewhere_are_kept(tmp_path: Path) -> None:
    lines = ("q\t\tp\t1", "r\t\tm\t1", "q\t\tn\t0", "s\t\tn\t0", "q\t\tp\t0")
    train = write_text(tmp_path / "cross.tsv", *lines)
    dev = write_text(tmp_path / "dev.tsv", "d\t\tp\t1")
    facts = run_import("rocketqa", tmp_path / "data", train, ("dev", dev))
    collection = open_collection(tmp_path / "data")
    rows = [
        (collection.query(row.query_id).text, *(collection.passage(key).text for key in (row.positive_id, *others)))
        for row in read_examples(tmp_path / "data.examples")
        for others in [row.negative_ids]
    ]
    assert rows == [("q", "p"), ("r", "m"), ("q", "p", "n"), ("q", "p")]
    assert facts["rows kept for dev, or without a positive"] == facts["negatives that are positives, or held out"] == 1
    assert [collection.query(query_id).text for query_id in collection.pool] == ["s"]


def test_a_dev_query_without_a_positive_never_becomes_a_training_query(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "t.jsonl", *({"query": f"q{n}", "pos": [f"p{n}"]} for n in range(2)))
    dev = write_rows(tmp_path / "d.jsonl", {"query": "d", "pos": ["p0"]}, {"query": "e", "pos": [], "neg": ["p1"]})
    facts = run_import("flagembedding", tmp_path / "data", train, ("dev", dev))
    assert facts["dev or test queries without a positive"] == 1
    assert open_collection(tmp_path / "data").pool == ()


def test_several_files_are_one_split(tmp_path: Path) -> None:
    paths = [write_rows(tmp_path / f"{n}.jsonl", {"query": f"q{n}", "pos": [f"p{n}"]}) for n in range(2)]
    dev = write_rows(tmp_path / "d.jsonl", {"query": "d", "pos": ["p0"]})
    assert run_import("flagembedding", tmp_path / "data", *paths, ("dev", dev))["examples"] == 2


def test_without_training_files_there_are_no_examples(tmp_path: Path) -> None:
    dev = write_rows(tmp_path / "d.jsonl", {"query": "d", "pos": ["p0"]})
    assert "examples" not in run_import("flagembedding", tmp_path / "data", ("dev", dev))
    assert not (tmp_path / "data.examples").exists()


def test_held_out_passages_are_no_negatives(tmp_path: Path) -> None:
    train = write_rows(
        tmp_path / "t.jsonl",
        {"question": "q", "positive_ctxs": [context("p", 1)], "hard_negative_ctxs": [context("n", 2), context("m", 3)]},
    )
    held_out = write_text(tmp_path / "held.txt", "2")
    run_import("dpr", tmp_path / "data", train, data=DataConfig(held_out=held_out))
    assert [row.negative_ids for row in read_examples(tmp_path / "data.examples")] == [("3",)]


def test_a_file_in_which_nothing_is_positive_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", {"query": "q", "pos": [], "neg": ["n"]})
    with pytest.raises(DataError, match="No row has a positive"):
        run_import("flagembedding", tmp_path / "data", path)


def test_an_id_with_other_words_is_refused_but_where_the_corpus_has_it(tmp_path: Path) -> None:
    rows = ({"question": f"q{n}", "positive_ctxs": [context(f"p{n}", 7)]} for n in range(2))
    path = write_rows(tmp_path / "t.jsonl", *rows)
    with pytest.raises(DataError, match="Passage 7 had other words before") as error:
        run_import("dpr", tmp_path / "data", path)
    assert (error.value.path, error.value.line) == (path, 2)
    corpus = write_text(tmp_path / "psgs.tsv", "id\ttext\ttitle", '7\t"a ""river"""\tLune', "8\tb\tB")
    facts = run_import("dpr", tmp_path / "data", path, corpus=corpus)
    assert open_collection(tmp_path / "data").passage("7") == Passage("7", "Lune", 'a "river"')
    assert (facts["passages"], facts.get("passages that the training files bring")) == (2, None)


def test_where_data_are_written_and_examples_are_not_it_says_so(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", {"question": "q", "positive_ctxs": [context("a", 7)]})
    corpus = write_text(tmp_path / "psgs.tsv", "id\ttext\ttitle", "7\ta\tA", "7\tb\tB")
    with pytest.raises(DataError, match=r"1 passage ids occur twice.* The data are written, the examples are not\."):
        run_import("dpr", tmp_path / "data", path, corpus=corpus)
    assert (tmp_path / "data").is_dir() and not (tmp_path / "data.examples").exists()
    run_import("dpr", tmp_path / "data", path, corpus=corpus, data=DataConfig(on_duplicate="first"))
    assert len(read_examples(tmp_path / "data.examples")) == 1


def test_tevatrons_new_keys_need_the_corpus_that_they_name(tmp_path: Path) -> None:
    row = {"query_id": 3, "query_text": "q", "positive_document_ids": [1], "negative_document_ids": ["2"]}
    path = write_rows(tmp_path / "t.jsonl", row)
    with pytest.raises(DataError, match=r"no text for passage 1. Name the corpus that has it as --corpus"):
        run_import("tevatron", tmp_path / "data", path)
    corpus = write_rows(tmp_path / "c.jsonl", {"docid": 1, "text": "a"}, {"docid": "2", "title": "B", "text": "b"})
    run_import("tevatron", tmp_path / "data", path, corpus=corpus)
    assert read_manifest(tmp_path / "data").inputs.keys() == {"train/t.jsonl", "corpus"}
    (example,) = read_examples(tmp_path / "data.examples")
    assert (example.query_id, example.positive_id, example.negative_ids) == ("3", "1", ("2",))


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["a.json"], [("train", Path("a.json"))]),
        (["train=a.json", "dev=b.json", "c.json"], [("train", "a.json"), ("dev", "b.json"), ("train", "c.json")]),
        (["x/y=z"], [("train", "x/y=z")]),
        (["="], [("train", "=")]),
    ],
)
def test_a_source_may_name_its_split(texts: list[str], wanted: list[tuple[str, str]]) -> None:
    assert parse_sources(texts) == [(split, Path(path)) for split, path in wanted]


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(Path("dev=a.json"))
    assert parse_sources(["dev=a.json"]) == [("train", Path("dev=a.json"))]


@pytest.mark.parametrize("source_format", ["dpr", "tevatron", "flagembedding", "rocketqa"])
def test_a_training_file_that_is_not_there(tmp_path: Path, source_format: str) -> None:
    with pytest.raises(UsageError, match="There is no such file"):
        run_import(source_format, tmp_path / "data", tmp_path / "nowhere.json")


# --- a collection into a BEIR folder ----------------------------------------------------------------------------------


def write_collection_folder(folder: Path) -> Path:
    write_text(folder / "collection.tsv", "0\tA river.", "1\tA market.", "2\tA bridge.")
    write_text(folder / "queries.train.tsv", "10\twhich river", "11\twhich market", "12\tasked by nobody")
    write_text(folder / "queries.dev.tsv", "20\twhich bridge", "21\twhich town", "22\twithout a label")
    write_text(folder / "queries.dev.small.tsv", "20\twhich bridge")
    write_text(folder / "queries.eval.tsv", "30\ta secret")
    write_text(folder / "qrels.train.tsv", "10\t0\t0\t1", "11\t0\t1\t1")
    write_text(folder / "qrels.dev.tsv", "20\t0\t2\t1", "21\t0\t2\t1")
    write_text(folder / "qrels.dev.small.tsv", "20\t0\t2\t1")
    return folder


def test_ms_marco_becomes_a_beir_folder(tmp_path: Path) -> None:
    facts = run_import("msmarco", tmp_path / "data", write_collection_folder(tmp_path / "marco"))
    collection = open_collection(tmp_path / "data")
    assert collection.qrels("train") == {"10": {"0": 1}, "11": {"1": 1}}
    assert collection.qrels("dev") == {"20": {"2": 1}}
    assert collection.labels("dev.full") == {"20": {"2": 1}, "21": {"2": 1}}
    assert collection.pool == ("12",)
    assert collection.passage("1") == Passage("1", "", "A market.")
    assert sorted(ids_of(tmp_path / "data" / "queries.jsonl")) == ["10", "11", "12", "20", "21"]
    assert (facts["passages"], facts["queries"], facts["dev or test queries without labels"]) == (3, 5, 2)
    assert not (tmp_path / "data.examples").exists()


def test_labels_of_two_columns_are_read_alike(tmp_path: Path) -> None:
    folder = write_collection_folder(tmp_path / "marco")
    run_import("msmarco", tmp_path / "four", folder)
    for name, lines in (("train", ("10\t0", "11\t1")), ("dev", ("20\t2", "21\t2")), ("dev.small", ("20\t2",))):
        write_text(folder / f"qrels.{name}.tsv", *lines)
    run_import("msmarco", tmp_path / "two", folder)
    assert open_collection(tmp_path / "two").fingerprint == open_collection(tmp_path / "four").fingerprint


def test_packed_files_are_read_alike(tmp_path: Path) -> None:
    folder = write_collection_folder(tmp_path / "marco")
    run_import("msmarco", tmp_path / "plain", folder)
    for path in sorted(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    run_import("msmarco", tmp_path / "packed", folder)
    assert open_collection(tmp_path / "packed").fingerprint == open_collection(tmp_path / "plain").fingerprint


def test_rocketqas_folder_becomes_a_beir_folder(tmp_path: Path) -> None:
    folder = tmp_path / "marco"
    write_text(folder / "para.txt", "0\tA river.", "1\tA market.", "2\tA bridge.")
    write_text(folder / "para.title.txt", "0\tLune", "1\t-")
    write_text(folder / "train.query.txt", "10\twhich river", "11\twhich market")
    write_text(folder / "dev.query.txt", "20\twhich bridge")
    write_text(folder / "qrels.train.tsv", "10\t0", "11\t1")
    write_text(folder / "qrels.train.addition.tsv", "10\t2", "11\t2")
    write_text(folder / "qrels.dev.tsv", "20\t2")
    for name in ("msmarco", "rocketqa"):
        run_import(name, tmp_path / name, folder)
        collection = open_collection(tmp_path / name)
        assert [collection.passage(str(n)).title for n in range(3)] == ["Lune", "", ""]
        assert collection.qrels("train") == {"10": {"0": 1}, "11": {"1": 1}}
        assert collection.given_splits == ("dev", "train")


def test_a_query_id_with_other_words_in_another_file_is_refused(tmp_path: Path) -> None:
    folder = write_collection_folder(tmp_path / "marco")
    path = write_text(folder / "queries.train.tsv", "10\twhich river", "20\tanother one")
    with pytest.raises(DataError, match="Query 20 had other words before") as error:
        run_import("msmarco", tmp_path / "data", folder)
    assert (error.value.path, error.value.line) == (path, 2)


@pytest.mark.parametrize("missing", ["collection.tsv", "queries"])
def test_a_folder_that_is_no_collection(tmp_path: Path, missing: str) -> None:
    folder = write_collection_folder(tmp_path / "marco")
    for path in folder.glob(f"{missing}*"):
        path.unlink()
    with pytest.raises(UsageError, match=r"This is no collection. One has collection.tsv or para.txt"):
        run_import("msmarco", tmp_path / "data", folder)


def test_only_a_collection_is_a_folder(tmp_path: Path) -> None:
    folder = write_collection_folder(tmp_path / "marco")
    file = folder / "collection.tsv"
    for source_format, sources in (("msmarco", [file]), ("dpr", [folder]), ("msmarco", [folder, file])):
        with pytest.raises(UsageError, match="A folder is a collection of msmarco or rocketqa"):
            run_import(source_format, tmp_path / "data", *sources)
    with pytest.raises(UsageError, match="A folder is a collection"):
        run_import("msmarco", tmp_path / "data", folder, corpus=file)


# --- from a BEIR folder, and back -------------------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Return a BEIR folder with examples beside it, with ids, titles, answers and a teacher's scores."""

    def make(name: str, n: int, score: float) -> dict[str, Any]:
        return {"docid": f"{name}{n}", "title": f"T{n % 2}" if n % 3 else "", "text": f"{name} {n}\tx", "score": score}

    def make_row(n: int) -> dict[str, Any]:
        positives = [make("p", n, 0.1 * n)] + ([make("p", n + 50, 2.5)] if n == 4 else [])
        negatives = [make("n", 10 * n + place, -0.3 * place - 1) for place in range(n % 3)]
        words = {"query_id": f"q{n}", "query": f'which "town" {n}', "answers": [f"a{n}"]}
        return words | {"positive_passages": positives, "negative_passages": negatives}

    train = write_rows(tmp_path / "train.jsonl", *(make_row(n) for n in range(6)))
    dev = write_rows(tmp_path / "dev.jsonl", make_row(7))
    run_import("tevatron", tmp_path / "data", train, ("dev", dev))
    return tmp_path / "data"


def describe(data: Path, *, unpaired: bool = True) -> list[tuple[Any, ...]]:
    """Return the examples beside a BEIR folder in words, with scores of 32 bits; with line breaks made blanks."""
    collection = open_collection(data)

    def look_up(passage_id: str) -> str:
        return flat(collection.passage(passage_id).joined)

    return [
        (
            collection.query(row.query_id).text,
            look_up(row.positive_id),
            tuple(map(look_up, row.negative_ids)),
            tuple(None if math.isnan(score) else score for score in (row.positive_score, *row.negative_scores)),
        )
        for row in read_examples(Path(f"{data}.examples"))
        if row.negative_ids or unpaired
    ]


@pytest.mark.parametrize(
    ("target", "source_format", "name", "corpus"),
    [
        ("dpr", "dpr", "json", "psgs_w100.tsv"),
        ("tevatron", "tevatron", "jsonl", "corpus.jsonl"),
        ("tevatron-old", "tevatron", "jsonl", "corpus.jsonl"),
        ("flagembedding", "flagembedding", "jsonl", None),
        ("rocketqa", "rocketqa", "tsv", None),
        ("rocketqa-cross", "rocketqa", "tsv", None),
    ],
)
def test_examples_come_back_as_they_went(
    scored: Path, tmp_path: Path, target: str, source_format: str, name: str, corpus: str | None
) -> None:
    out = tmp_path / "out"
    facts = run_export(target, scored, out, Path(f"{scored}.examples"))
    dev = out / f"dev.{name}"
    if target in ("rocketqa", "rocketqa-cross"):  # without negatives there is no dual form, and one split has examples
        assert not dev.exists()
        dev = write_text(tmp_path / "dev.tsv", 'which "town" 7\tT1\tp 7 x\t1')
    assert facts["rows of train"] == (4 if target == "rocketqa" else 6)
    options = {} if corpus is None else {"corpus": out / corpus}
    run_import(source_format, tmp_path / "back", out / f"train.{name}", ("dev", dev), scores="keep", **options)
    wanted = describe(scored, unpaired=target != "rocketqa")
    found = describe(tmp_path / "back")
    if target in ("tevatron", "rocketqa", "rocketqa-cross"):
        wanted = [(*row[:3], (None,) * len(row[3])) for row in wanted]
    assert found == wanted
    if corpus is not None:
        ids = [[(row.query_id, row.positive_id, row.negative_ids) for row in read_examples(Path(f"{data}.examples"))]
               for data in (scored, tmp_path / "back")]  # fmt: skip
        assert ids[0] == ids[1]
        assert len(open_collection(tmp_path / "back").passages) == len(open_collection(scored).passages)
    if target in ("dpr", "tevatron-old"):
        first, second = (read_answers(data / "answers.jsonl") for data in (scored, tmp_path / "back"))
        assert first == second


def test_scores_are_written_with_the_digits_of_32_bits(scored: Path, tmp_path: Path) -> None:
    run_export("flagembedding", scored, tmp_path / "out", Path(f"{scored}.examples"))
    rows = [value for _, value in read_jsonl(tmp_path / "out" / "train.jsonl")]
    assert rows[5]["pos_scores"] == [0.5]
    assert rows[5]["neg_scores"] == [-1.0, -1.3]
    assert np.float32(rows[5]["neg_scores"][1]) == np.float32(-1.3)


@pytest.mark.parametrize(("target", "joined"), [("msmarco", True), ("rocketqa", False)])
@settings(max_examples=12)
@given(corpus=passages(), texts=st.lists(TEXTS, min_size=4, max_size=4))
def test_a_collection_comes_back_as_it_went(
    tmp_path: Path, write_beir: WriteBeir, target: str, joined: bool, corpus: list[Passage], texts: list[str]
) -> None:
    corpus = [*corpus, Passage("an id with blanks", "A title", "a text")]
    queries = {"t": texts[0], "d 1": texts[1], "u": texts[2], "x": texts[3]}
    last = corpus[-1].passage_id
    labels = {"train": {"t": {last: 2}}, "dev": {"d 1": {last: 1}}, "test": {"x": {last: 1}}}
    data = write_beir(tmp_path / "data", {p.passage_id: (p.title, p.text) for p in corpus}, queries, labels)
    run_export(target, data, tmp_path / "out")
    run_import(target, tmp_path / "back", tmp_path / "out")
    change = (lambda p: Passage(p.passage_id, "", flat(p.joined))) if joined else CORPORA[1][2]
    collection = open_collection(tmp_path / "back")
    assert [passage for block in collection.read_passages() for passage in block] == [change(p) for p in corpus]
    assert {q: collection.query(q).text for q in queries} == {q: flat(text) for q, text in queries.items()}
    wanted = labels if target == "msmarco" else labels | {"train": {"t": {last: 1}}}
    assert {split: collection.labels(split) for split in labels} == wanted


def test_labels_that_are_not_relevant_stay_in_four_columns(tmp_path: Path, write_beir: WriteBeir) -> None:
    data = write_beir(tmp_path / "data", {"a": "x", "b": "y"}, {"q": "w", "r": "v"}, {"dev": {"q": {"a": 0, "b": 1}}})
    for target, wanted in (("msmarco", ["q\t0\ta\t0", "q\t0\tb\t1"]), ("rocketqa", ["q\tb"])):
        run_export(target, data, tmp_path / target)
        assert read_lines_of(tmp_path / target / "qrels.dev.tsv") == wanted
    assert read_lines_of(tmp_path / "msmarco" / "queries.train.tsv") == ["r\tv"]


def test_without_examples_the_labels_of_every_split_are_rows(tmp_path: Path, write_beir: WriteBeir) -> None:
    corpus = {"a": ("T", "x"), "b": "y"}
    labels = {"train": {"q": {"a": 1, "b": 1}}, "dev": {"r": {"b": 1}}, "test": {"s": {"a": 0, "b": 1}}}
    unjudged = {"other": {"r": {"a": 0}}}
    data = write_beir(tmp_path / "data", corpus, {"q": "w", "r": "v", "s": "u"}, labels | unjudged)
    facts = run_export("flagembedding", data, tmp_path / "out")
    files_of = {split: tmp_path / "out" / f"{split}.jsonl" for split in labels}
    assert {split: [value for _, value in read_jsonl(path)] for split, path in files_of.items()} == {
        "train": [{"query": "w", "pos": ["T x", "y"], "neg": []}],
        "dev": [{"query": "v", "pos": ["y"], "neg": []}],
        "test": [{"query": "u", "pos": ["y"], "neg": []}],
    }
    assert facts == {"passages": 2, "rows of train": 1, "rows of dev": 1, "rows of test": 1}
    assert not (tmp_path / "out" / "other.jsonl").exists()


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [("all", ["labelled", "pseudo"]), ("labelled", ["labelled"]), ("pseudo", ["pseudo"]), ("plain", ["plain"])],
)
def test_which_examples_are_written(tmp_path: Path, write_beir: WriteBeir, rows: str, wanted: list[str]) -> None:
    names = ("labelled", "pseudo", "plain")
    data = write_beir(tmp_path / "data", {"a": "x", "b": "y"}, dict(zip(names, names, strict=True)), {"dev": {}})
    examples = {name: Example(name, "a", ("b",), ("a",), "labelled", 1.0, (0.0,)) for name in names}
    fingerprint = open_collection(data).fingerprint
    with publish(tmp_path / "examples", "examples", options={}, inputs={"collection": fingerprint}) as staging:
        for name, example in examples.items():
            write_examples(staging.path / f"{name}.arrow", [example])
    run_export("flagembedding", data, tmp_path / "out", tmp_path / "examples", rows=rows)
    assert [value["query"] for _, value in read_jsonl(tmp_path / "out" / "train.jsonl")] == wanted


def test_examples_of_other_data_are_refused(scored: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", {"query": "q", "pos": ["p"]}, {"query": "r", "pos": ["s"]})
    run_import("flagembedding", tmp_path / "other", other)
    with pytest.raises(ArtefactError, match="These examples were made from data"):
        run_export("dpr", tmp_path / "other", tmp_path / "out", Path(f"{scored}.examples"))
    assert not (tmp_path / "out").exists()


def test_ms_marco_has_no_place_for_examples(scored: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="MS MARCO's form has no place for examples"):
        run_export("msmarco", scored, tmp_path / "out", Path(f"{scored}.examples"))


def test_there_has_to_be_something_to_write(tmp_path: Path, write_beir: WriteBeir) -> None:
    data = write_beir(tmp_path / "bare", {"a": "x"}, {"q": "w"}, {})
    with pytest.raises(DataError, match="There is no row to write"):
        run_export("dpr", data, tmp_path / "out")
    rows = write_rows(tmp_path / "t.jsonl", {"query": "q", "pos": ["p"]}, {"query": "r", "pos": ["s"]})
    run_import("flagembedding", tmp_path / "data", rows)
    with pytest.raises(DataError, match="There is no row to write"):
        run_export("rocketqa", tmp_path / "data", tmp_path / "out", tmp_path / "data.examples")
    assert not (tmp_path / "out").exists()


# --- the commands, and training on what was read ----------------------------------------------------------------------


def call(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert not end.value.code


@pytest.fixture
def foreign(tmp_path: Path, toy: Path) -> dict[str, Path]:
    """Return the toy data's training and dev questions as DPR keeps them, with two negatives and scores each."""
    source = open_collection(toy)
    corpus = [passage for block in source.read_passages() for passage in block]
    found = {}
    for split in ("train", "dev"):
        rows = []
        for number, (query_id, judged) in enumerate(source.labels(split).items()):
            positives = [source.passage(passage_id) for passage_id in judged]
            negatives = [p for p in corpus[number : number + 3] if p not in positives][:2]
            sides = {"positive_ctxs": (positives, 3.0), "hard_negative_ctxs": (negatives, 1.0)}
            contexts = {
                side: [{"title": p.title, "text": p.text, "passage_id": p.passage_id, "score": score} for p in chosen]
                for side, (chosen, score) in sides.items()
            }
            rows.append({"question": source.query(query_id).text, "answers": [], **contexts})
        found[split] = tmp_path / f"{split}.json"
        found[split].write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return found


@pytest.mark.parametrize("arm", ["pair", "labelled_only"])
def test_training_runs_on_imported_examples(
    tmp_path: Path, foreign: dict[str, Path], tiny_model: Path, capsys: pytest.CaptureFixture[str], arm: str
) -> None:
    data, model = tmp_path / "nq", tmp_path / "model"
    sources = [f"{split}={path}" for split, path in foreign.items()]
    call("import-data", *sources, "--from", "dpr", "--scores", "keep", "-o", data)
    told = capsys.readouterr().out
    assert f"pairdr train {data} {data}.examples --output MODEL" in told
    assert "train queries" in told
    options = ("--max-steps", 2, "--per-device-train-batch-size", 8, "--eval-passages", 20, "--eval-queries", 5)
    distil = ("--distillation", "listwise") if arm == "pair" else ()
    place = ("-o", model, "--start", tiny_model, "--device", "cpu", "--arm", arm)
    call("train", data, f"{data}.examples", *place, *options, *distil)
    facts = read_manifest(model, "model").facts
    assert facts["examples"] == read_manifest(f"{data}.examples").facts["labelled"] == 48
    assert [stage["name"] for stage in facts["stages"]] == (
        ["pair", "query_centric"] if arm == "pair" else ["query_centric"]
    )
    if arm == "pair":
        last = json.loads(read_lines_of(model / "training.jsonl")[-1])
        assert last["distillation"] > 0


def test_the_commands_go_there_and_back(
    tmp_path: Path, foreign: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "nq"
    call("import-data", foreign["train"], f"dev={foreign['dev']}", "--from", "dpr", "-o", data)
    call("export-data", data, f"{data}.examples", "--to", "tevatron", "--rows", "labelled", "-o", tmp_path / "tevatron")
    told = capsys.readouterr().out
    assert "rows of train" in told
    rows = [value for _, value in read_jsonl(tmp_path / "tevatron" / "train.jsonl")]
    assert len(rows) == 48
    assert all(len(row["positive_document_ids"]) == 1 and len(row["negative_document_ids"]) == 2 for row in rows)
    train, corpus = tmp_path / "tevatron" / "train.jsonl", tmp_path / "tevatron" / "corpus.jsonl"
    call("import-data", train, "--from", "tevatron", "--corpus", corpus, "--dev-queries", 4, "-o", tmp_path / "back")
    assert len(open_collection(tmp_path / "back", DataConfig(dev_queries=4)).qrels("dev")) == 4
    assert read_manifest(tmp_path / "back.examples").facts["labelled"] == 44


def test_a_broken_file_ends_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_text(tmp_path / "t.jsonl", '{"query": "q"}')
    with pytest.raises(SystemExit) as end:
        main(["import-data", str(path), "--from", "flagembedding", "-o", str(tmp_path / "data")])
    assert end.value.code == 1
    assert capsys.readouterr().err == f'pairdr: {path}:1: "pos" is missing or is no list. Add it.\n'


@pytest.mark.parametrize("config", [ImportDataConfig, ExportDataConfig])
def test_every_option_stands_in_its_page(config: type) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert [spec.name for spec in fields(config) if f"`{spec.name}`" not in text] == []


@pytest.mark.parametrize(("config", "name"), [(ImportDataConfig, "scores"), (ExportDataConfig, "rows")])
def test_an_option_that_cannot_be_is_refused(config: type, name: str) -> None:
    with pytest.raises(PairdrError, match=f"Option {name} is 'best'; it must be one of"):
        config(**{name: "best"})
