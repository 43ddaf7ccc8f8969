"""Data by their names elsewhere: data sets of ir_datasets and repositories of the hub, made here of local files."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairdr import cli
from pairdr.artefact import read_manifest, verify_artefact
from pairdr.collection import Collection, cache_folder, open_collection
from pairdr.config import DataConfig
from pairdr.errors import DataError, MissingExtraError, PairdrError, UsageError
from pairdr.formats import read_qrels
from pairdr.records import Passage
from pairdr.sources import named
from pairdr.sources.folder import make_row, read_relevance
from pairdr.sources.ir import read_ir_dataset

CORPUS = {
    "p1": ("Rivers", "The Lune is a river."),
    "p2": ("Markets", "A market on Monday."),
    "p3": ("Bridges", "An old bridge."),
}
QUERIES = {"t1": "which river", "t2": "which market", "d1": "which bridge", "e1": "what is old", "u1": "which town"}
QRELS = {"train": {"t1": {"p1": 1}, "t2": {"p2": 2, "p1": 0}}, "dev": {"d1": {"p3": 1}}, "test": {"e1": {"p3": 1}}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache of its own."""
    monkeypatch.setenv("PAIRDR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return ir_datasets, with a folder of its own: it makes one when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IR_DATASETS_HOME", str(tmp_path_factory.mktemp("irds")))
        import ir_datasets

        yield ir_datasets


@pytest.fixture
def folder(tmp_path: Path, write_beir: Callable[..., Path]) -> Path:
    """Return a BEIR folder."""
    return write_beir(tmp_path / "plain", CORPUS, QUERIES, QRELS)


@pytest.fixture
def register(library: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return `register(name, *components)`, which makes a data set of ir_datasets for one test."""

    def add(name: str, *components: Any) -> None:
        monkeypatch.setitem(library.registry._registered, name, library.Dataset(*components))

    return add


@pytest.fixture
def beir(library: Any, register: Callable[..., None], folder: Path, tmp_path: Path) -> str:
    """Return the name of a data set as ir_datasets has those of BEIR: docs and all queries, three labelled subsets."""
    from ir_datasets.datasets.base import FilteredQueries
    from ir_datasets.datasets.beir import BeirDocs, BeirQrels, BeirQueries, BeirTitleDoc, qid_filter

    local, name = library.util.LocalDownload, f"made/{tmp_path.name}"
    docs = BeirDocs(tmp_path.name, local(folder / "corpus.jsonl"), BeirTitleDoc)
    queries = BeirQueries(tmp_path.name, local(folder / "queries.jsonl"), library.formats.GenericQuery)
    register(name, docs, queries)
    for split in QRELS:
        qrels = BeirQrels(local(folder / "qrels" / f"{split}.tsv"), {})
        register(f"{name}/{split}", docs, FilteredQueries(queries, qid_filter(qrels)), qrels)
    return name


def read_all(data: Collection) -> tuple[list[Passage], dict[str, str], dict[str, Any]]:
    """Return everything that a collection holds."""
    passages = [passage for block in data.read_passages() for passage in block]
    queries = dict(row for block in data.queries.read_blocks(("id", "text")) for row in block)
    return passages, queries, {split: data.labels(split) for split in data.given_splits}


def files_below(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()]


def source_of(name: str | Path) -> Path:
    """Return the folder that a name was converted to."""
    return named.find_data(name, cache_folder())


# --- ir: --------------------------------------------------------------------------------------------------------------


def test_a_name_takes_its_subsets_as_splits(beir: str, folder: Path) -> None:
    data = open_collection(f"ir:{beir}")
    assert read_all(data) == read_all(open_collection(folder))
    assert data.given_splits == ("dev", "test", "train")
    assert data.pool == ("u1",)
    assert data.name == beir.replace("/", "-")


def test_what_was_read_stands_in_the_manifest(beir: str, library: Any) -> None:
    manifest = verify_artefact(source_of(f"ir:{beir}"))
    assert manifest.options == {"source": f"ir:{beir}"}
    assert manifest.inputs == {"ir_datasets": library.__version__}
    assert manifest.facts["passages"] == 3 and manifest.facts["queries"] == 5
    assert manifest.facts["splits"]["train"] == {"from": f"{beir}/train", "queries": 2}


@pytest.mark.parametrize("split", QRELS)
def test_a_subset_is_that_split_alone(beir: str, split: str) -> None:
    passages, queries, qrels = read_all(open_collection(f"ir:{beir}/{split}"))
    assert len(passages) == 3
    assert qrels == {split: QRELS[split]}
    assert queries.keys() == QRELS[split].keys()


def test_a_path_carries_a_name_as_it_is(beir: str) -> None:
    assert source_of(Path(f"ir:{beir}")) == source_of(f"ir:{beir}")


def make_tsv(library: Any, tmp_path: Path, number: int = 0, labels: str = "q1 0 d1 1\n") -> tuple[Any, Any, Any]:
    """Return docs, queries and qrels of plain files, as `ir_datasets.create_dataset` makes them."""
    place = tmp_path / f"tsv{number}"
    place.mkdir()
    (place / "docs.tsv").write_text("d1\tThe Lune.\nd2\tA market.\n", encoding="utf-8")
    (place / "queries.tsv").write_text("q1\twhich river\nq2\twhich market\n", encoding="utf-8")
    (place / "qrels").write_text(labels, encoding="utf-8")
    formats, local = library.formats, library.util.LocalDownload
    return (
        formats.TsvDocs(local(place / "docs.tsv")),
        formats.TsvQueries(local(place / "queries.tsv")),
        formats.TrecQrels(local(place / "qrels"), {}),
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("made-passage/dev/small", "dev"),
        ("made-passage/train/split200-valid", "dev"),
        ("made/en1k/training", "train"),
        ("made/dl-2019/judged", "test"),
        ("made/validation", "dev"),
        ("made", "test"),
    ],
)
def test_a_lone_data_set_is_the_split_that_its_name_says(
    library: Any, register: Callable[..., None], tmp_path: Path, name: str, split: str
) -> None:
    register(name, *make_tsv(library, tmp_path))
    data = open_collection(f"ir:{name}")
    assert read_all(data)[2] == {split: {"q1": {"d1": 1}}}
    assert data.passage("d1") == Passage("d1", "", "The Lune.")


@pytest.mark.parametrize(("word", "split"), [("training", "train"), ("validation", "dev"), ("valid", "dev")])
def test_other_words_for_subsets(
    library: Any, register: Callable[..., None], tmp_path: Path, word: str, split: str
) -> None:
    docs, queries, qrels = make_tsv(library, tmp_path)
    register("made", docs)
    register(f"made/{word}", docs, queries, qrels)
    assert open_collection("ir:made").given_splits == (split,)


def test_of_two_words_for_a_split_the_usual_one_is_taken(
    library: Any, register: Callable[..., None], tmp_path: Path
) -> None:
    docs, queries, qrels = make_tsv(library, tmp_path)
    register("made/val", docs, queries, qrels)
    register("made/dev", docs, queries, qrels)
    assert read_ir_dataset("made", {}).labels_from == {"dev": "made/dev"}


def test_splits_that_are_named_are_the_only_ones_taken(beir: str) -> None:
    assert len(open_collection(f"ir:{beir}").queries) == 5
    passages, queries, qrels = read_all(open_collection(f"ir:{beir},train=train,test=dev"))
    assert len(passages) == 3
    assert qrels == {"train": QRELS["train"], "test": QRELS["dev"]}
    assert queries.keys() == {"t1", "t2", "d1"}


def test_a_split_can_be_a_whole_name_and_have_any_name(beir: str) -> None:
    _, queries, qrels = read_all(open_collection(f"ir:{beir}/train,train={beir}/train,trec-2019={beir}/test"))
    assert qrels == {"train": QRELS["train"], "trec-2019": QRELS["test"]}
    assert queries.keys() == {"t1", "t2", "e1"}


def test_a_group_that_is_no_data_set_itself_takes_its_subsets(
    library: Any, register: Callable[..., None], tmp_path: Path
) -> None:
    parts = make_tsv(library, tmp_path)
    register("made/group/train", *parts)
    assert open_collection("ir:made/group").given_splits == ("train",)


def test_unlabelled_questions_of_dev_are_not_for_training(
    library: Any, register: Callable[..., None], tmp_path: Path
) -> None:
    docs, queries, qrels = make_tsv(library, tmp_path)
    register("made", docs)
    register("made/dev", docs, queries, qrels)
    assert read_all(open_collection("ir:made"))[1] == {"q1": "which river"}
    register("made2", docs)
    register("made2/train", docs, queries, qrels)
    assert open_collection("ir:made2").pool == ("q2",)


def test_a_corpus_without_questions_can_be_encoded(library: Any, register: Callable[..., None], tmp_path: Path) -> None:
    register("made", make_tsv(library, tmp_path)[0])
    data = open_collection("ir:made")
    assert (len(data.passages), len(data.queries), data.given_splits) == (2, 0, ())


def test_of_two_judgements_the_higher_counts(library: Any, register: Callable[..., None], tmp_path: Path) -> None:
    register("made", *make_tsv(library, tmp_path, labels="q1 0 d1 2\nq1 1 d1 0\nq1 0 d2 -1\n"))
    assert open_collection("ir:made").labels("test") == {"q1": {"d1": 2, "d2": -1}}


class FieldsDoc(NamedTuple):
    doc_id: str
    headline: str
    body: str
    marked_up: str
    year: int
    tags: list[str]
    raw: bytes

    def default_text(self) -> str:
        return f"{self.headline} {self.body}"


class TitledDoc(NamedTuple):
    doc_id: str
    title: str
    text: str

    def default_text(self) -> str:
        return self.text


def docs_of(library: Any, *docs: Any) -> Any:
    """Return a docs component that holds these."""

    class Docs(library.formats.BaseDocs):
        def docs_iter(self) -> Iterator[Any]:
            for doc in docs:
                if isinstance(doc, BaseException):
                    raise doc
                yield doc

        def docs_cls(self) -> Any:
            return type(docs[0])

    return Docs()


def test_the_title_is_cut_off_the_text_and_short_fields_are_metadata(
    library: Any, register: Callable[..., None]
) -> None:
    doc = FieldsDoc("d1", "Rivers", "The Lune.", "x" * 400, 1999, ["water", "north"], b"raw")
    register("made", docs_of(library, doc, doc._replace(doc_id="d2", headline="", tags=[])))
    data = open_collection("ir:made")
    assert data.passage("d1") == Passage("d1", "Rivers", "The Lune.", '{"tags": ["water", "north"], "year": 1999}')
    assert data.passage("d2") == Passage("d2", "", "The Lune.", '{"year": 1999}')


def test_a_title_that_is_not_in_the_text_stays_out(library: Any, register: Callable[..., None]) -> None:
    register("made", docs_of(library, TitledDoc("d1", "Rivers", "The Lune.")))
    assert open_collection("ir:made").passage("d1") == Passage("d1", "", "The Lune.")


def test_what_no_file_of_ours_can_hold_is_mended(library: Any, register: Callable[..., None]) -> None:
    register("made", docs_of(library, library.formats.GenericDoc("d1", "a\0b \ud800c")))
    assert open_collection("ir:made").passage("d1").text == "a b ?c"


def test_duplicates_are_settled_as_in_any_folder(library: Any, register: Callable[..., None]) -> None:
    make = library.formats.GenericDoc
    register("made", docs_of(library, make("d1", "old"), make("d1", "new")))
    with pytest.raises(DataError, match=r"1 passage ids occur twice.*--on-duplicate"):
        open_collection("ir:made")
    assert open_collection("ir:made", DataConfig(on_duplicate="last")).passage("d1").text == "new"


def test_one_question_id_with_two_texts_is_told(library: Any, register: Callable[..., None], tmp_path: Path) -> None:
    docs, queries, qrels = make_tsv(library, tmp_path)
    (tmp_path / "other.tsv").write_text("q1\tanother question\n", encoding="utf-8")
    other = library.formats.TsvQueries(library.util.LocalDownload(tmp_path / "other.tsv"))
    register("made/train", docs, queries, qrels)
    register("made/test", docs, other, qrels)
    with pytest.raises(DataError, match="1 query ids occur twice, such as 'q1'"):
        open_collection("ir:made")


def test_the_librarys_own_names_keep_to_the_conventions(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pairdr.sources import ir

    monkeypatch.setattr(ir, "_read_qrels", lambda name, dataset: {})  # labels would be downloaded
    expected = {
        "beir/scifact": {"train": "beir/scifact/train", "test": "beir/scifact/test"},
        "beir/nq": {"test": "beir/nq"},
        "msmarco-passage": {"train": "msmarco-passage/train", "dev": "msmarco-passage/dev"},
        "msmarco-passage/dev/small": {"dev": "msmarco-passage/dev/small"},
        "dpr-w100/natural-questions": {
            "train": "dpr-w100/natural-questions/train",
            "dev": "dpr-w100/natural-questions/dev",
        },
        "mr-tydi/en": {split: f"mr-tydi/en/{split}" for split in ("train", "dev", "test")},
        "tripclick": {"train": "tripclick/train", "dev": "tripclick/val"},
    }
    assert {name: read_ir_dataset(name, {}).labels_from for name in expected} == expected
    outcomes = {}
    for name in library.registry:
        try:
            outcomes[name] = "read" if read_ir_dataset(name, {}).passages else ""
        except UsageError as error:
            outcomes[name] = error.what
    assert sum(outcome == "read" for outcome in outcomes.values()) > 600
    refused = {name: outcome for name, outcome in outcomes.items() if outcome != "read"}
    assert refused["beir"] == "beir is a group of data sets."
    assert refused["codesearchnet"] == "ir_datasets does not say what the text of codesearchnet is."
    assert refused["trec-tot/2025"] == "trec-tot/2025 and trec-tot/2025/train have different documents."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beir/scifct", "ir_datasets has no 'beir/scifct'. There are: .*beir/scifact"),
        ("scifact", "has no 'scifact'. There are: .*beir/scifact"),
        ("beir", "beir is a group of data sets. There are: beir/arguana, .* and [0-9]+ more\\."),
        ("qqqqqqqq", "has no 'qqqqqqqq'. https://ir-datasets.com lists"),
        ("lotte/lifestyle", "has no 'lotte/lifestyle'. There are: lotte/lifestyle/dev, "),
        ("beir/scifact,dev=valid", "has no beir/scifact/valid. There are: "),
        ("msmarco-passage,test=eval/small", "eval/small has no relevance labels. Name another subset for test."),
        ("trec-tot/2025", "have different documents. Name one of them."),
        ("clinicaltrials/2021", "does not say what the text of .* is. .*doc_id, title, condition"),
        ("", "'ir:' names no data set. Write ir:beir/scifact"),
        ("beir/scifact,train", "'train' in 'ir:beir/scifact,train' names no split. Write SPLIT=SUBSET"),
        ("beir/scifact,../x=train", "names no split"),
        ("beir/scifact,test=", "names no split"),
    ],
)
def test_a_wrong_name_says_what_there_is(library: Any, own_cache: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_collection(f"ir:{name}")
    assert files_below(own_cache) == []


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(MissingExtraError, match=r"ir_datasets.*pip install 'pairdr\[sources\]'"):
        open_collection("ir:beir/scifact")


def test_a_second_opening_needs_neither_library_nor_files(
    beir: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = open_collection(f"ir:{beir}")
    assert f"reading ir:{beir} ..." in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    shutil.rmtree(folder)
    second = open_collection(f"ir:{beir}")
    assert second.fingerprint == first.fingerprint
    assert "reading" not in capsys.readouterr().err


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), DataError("Broken.")])
def test_an_interrupted_conversion_leaves_nothing_and_can_be_done_again(
    library: Any, register: Callable[..., None], own_cache: Path, stop: BaseException
) -> None:
    good = [library.formats.GenericDoc(f"d{number}", "text") for number in range(3)]
    register("made", docs_of(library, *good, stop))
    with pytest.raises((KeyboardInterrupt, DataError)):
        open_collection("ir:made")
    assert files_below(own_cache) == []
    register("made", docs_of(library, *good))
    assert len(open_collection("ir:made").passages) == 3


def test_a_killed_conversion_is_begun_anew(beir: str, own_cache: Path) -> None:
    place = source_of(f"ir:{beir}")
    partial = place.with_name(f".{place.name}.new.partial")
    place.rename(partial)
    (partial / "manifest.json").unlink()
    assert source_of(f"ir:{beir}") == place
    verify_artefact(place)
    assert not partial.exists()


def test_what_the_library_cannot_read_is_told_with_its_reason(
    library: Any, register: Callable[..., None], tmp_path: Path
) -> None:
    docs, queries, _ = make_tsv(library, tmp_path)
    expected = library.datasets.base.ExpectedFile(tmp_path / "made" / "qrels", instructions="Ask the owner for it.")
    register("made", docs, queries, library.formats.TrecQrels(expected, {}))
    with pytest.raises(DataError, match=r"cannot read made: .*does not exist\. Ask the owner for it\. Check the"):
        open_collection("ir:made")


def test_a_relevance_that_is_no_whole_number_is_refused() -> None:
    assert [read_relevance(value, "x") for value in (1, "2", 1.0, -1)] == [1, 2, 1, -1]
    for value in (0.5, "a", None, float("nan")):
        with pytest.raises(DataError, match="x has the relevance"):
            read_relevance(value, "x")


def test_commands_take_names(beir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["check", f"ir:{beir}"], ["index-words", f"ir:{beir}", "-o", str(tmp_path / "bm25")]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert not end.value.code, capsys.readouterr().err
    assert read_manifest(tmp_path / "bm25").facts["passages"] == 3
    with pytest.raises(SystemExit) as end:
        cli.main(["check", "ir:no/such/data"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("pairdr: ir_datasets has no 'no/such/data'.")


# --- hf: --------------------------------------------------------------------------------------------------------------

ROWS = [{"_id": key, "title": title, "text": text} for key, (title, text) in CORPUS.items()]
QUESTIONS = [{"_id": key, "text": text} for key, text in QUERIES.items()]
LABELS = {
    split: [
        {"query-id": q, "corpus-id": p, "score": score} for q, judged in qrels.items() for p, score in judged.items()
    ]
    for split, qrels in QRELS.items()
}


def write_records(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table in the form that the path's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".tsv":
        columns = ("query-id", "corpus-id", "score")
        values = [columns, *([str(row[column]) for column in columns] for row in rows)]
        path.write_text("".join("\t".join(line) + "\n" for line in values), encoding="utf-8")
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def write_repository(place: Path, corpus: str, queries: str, labels: str | None, apart: str | None = None) -> Path:
    """Write a copy of a repository; `{}` in the path of the labels is the split."""
    write_records(place / corpus, ROWS)
    write_records(place / queries, QUESTIONS)
    for split, rows in LABELS.items():
        if labels:
            write_records(place / labels.format(split), rows)
        if apart:
            write_records(place.with_name(f"{place.name}-qrels") / apart.format(split), rows)
    return place


SHARD = "-00000-of-00001.parquet"
FORMS = {
    "json lines": ("corpus.jsonl", "queries.jsonl", "qrels/{}.tsv", None),
    "gzipped, labels apart": ("corpus.jsonl.gz", "queries.jsonl.gz", None, "{}.tsv"),
    "parquet, labels apart": (f"corpus/corpus{SHARD}", f"queries/queries{SHARD}", None, "{}.tsv"),
    "labels as json lines": ("corpus.jsonl", "queries.jsonl", "qrels/{}.jsonl", None),
    "labels as parquet": (f"corpus/test{SHARD}", f"queries/test{SHARD}", f"qrels/{{}}{SHARD}", None),
    "one config": (f"data/corpus{SHARD}", f"data/queries{SHARD}", None, f"data/{{}}{SHARD}"),
    "default config": ("corpus/a.jsonl", "queries/a.jsonl.gz", f"data/{{}}{SHARD}", None),
    "the hub's conversion": (
        *("corpus/corpus/0000.parquet", "queries/queries/0000.parquet"),
        *("default/{}/0000.parquet", None),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_repository_is_the_same_data(tmp_path: Path, folder: Path, form: str) -> None:
    place = write_repository(tmp_path / "copy", *FORMS[form])
    data = open_collection(f"hf:{place}")
    assert read_all(data) == read_all(open_collection(folder))
    assert (data.name, data.pool) == ("copy", ("u1",))


def test_shards_are_read_in_their_order(tmp_path: Path) -> None:
    place = write_repository(tmp_path / "copy", "queries.jsonl", "queries.jsonl", "qrels/{}.tsv")
    for number, row in enumerate(ROWS):
        write_records(place / "corpus" / f"corpus-{number:05}-of-00003.parquet", [row])
    assert [passage.passage_id for passage in read_all(open_collection(f"hf:{place}"))[0]] == ["p1", "p2", "p3"]


def test_other_keys_empty_fields_and_metadata(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "title": None, "text": None, "metadata": {"year": 1999, "url": None}},
        {"id": 2, "title": "B", "text": "b", "metadata": {"year": None, "url": None}},
    ]
    write_records(tmp_path / "copy" / "corpus.parquet", rows)
    write_records(tmp_path / "copy" / "queries.parquet", [{"id": 7, "text": "what"}])
    labels = [{"qid": 7, "pid": 2, "score": 1.0}]
    write_records(tmp_path / "copy" / "data" / "validation-00000-of-00001.parquet", labels)
    data = open_collection(f"hf:{tmp_path / 'copy'}")
    assert data.passage("1") == Passage("1", "", "", '{"year": 1999}')
    assert data.passage("2") == Passage("2", "B", "b")
    assert data.labels("dev") == {"7": {"2": 1}}


def test_a_title_that_is_no_text_is_named(tmp_path: Path) -> None:
    place = write_repository(tmp_path / "copy", *FORMS["json lines"])
    write_records(place / "corpus.jsonl", [{"_id": "p1", "title": 3, "text": "three"}])
    with pytest.raises(DataError, match="a title is a text") as caught:
        open_collection(f"hf:{place}")
    assert caught.value.line == 1


def test_splits_can_be_named_and_questions_of_others_stay_out(tmp_path: Path) -> None:
    place = write_repository(tmp_path / "copy", *FORMS["json lines"])
    data = open_collection(f"hf:{place},train=train,test=validation")
    _, queries, qrels = read_all(data)
    assert qrels == {"train": QRELS["train"], "test": QRELS["dev"]}
    assert queries.keys() == {"t1", "t2", "d1", "u1"}
    assert data.pool == ("u1",)


def test_a_copy_that_changes_is_read_anew(tmp_path: Path) -> None:
    place = write_repository(tmp_path / "copy", *FORMS["gzipped, labels apart"])
    before = source_of(f"hf:{place}")
    assert source_of(f"hf:{place}") == before
    write_records(tmp_path / "copy-qrels" / "test.tsv", [])
    after = source_of(f"hf:{place}")
    assert after != before
    assert read_qrels(after / "qrels" / "test.tsv") == {}


def test_a_repository_without_labels_is_a_corpus_and_a_pool(tmp_path: Path) -> None:
    data = open_collection(f"hf:{write_repository(tmp_path / 'copy', 'corpus.jsonl', 'queries.jsonl', None)}")
    assert (len(data.passages), len(data.pool), data.given_splits) == (3, 5, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: (place / "corpus.jsonl").unlink(), "has no corpus in BEIR's form. It needs corpus.jsonl"),
        (lambda place: shutil.rmtree(place), "There is no data set '.*copy' on the hub and no such folder"),
        (lambda place: write_records(place / "corpus.jsonl", [{"_id": "1", "body": "x"}]), "here are: _id, body"),
        (lambda place: write_records(place / "queries.jsonl", [{"text": "x"}]), "jsonl:1: A record needs _id and text"),
        (lambda place: (place / "queries.jsonl").write_text("{", encoding="utf-8"), "Broken JSON"),
    ],
)
def test_a_broken_repository_is_told(
    tmp_path: Path, own_cache: Path, change: Callable[[Path], Any], message: str
) -> None:
    place = write_repository(tmp_path / "copy", *FORMS["json lines"])
    change(place)
    with pytest.raises(PairdrError, match=message):
        open_collection(f"hf:{place}")
    assert files_below(own_cache) == []


def test_broken_parquet_and_labels_are_told(tmp_path: Path) -> None:
    place = write_repository(tmp_path / "copy", *FORMS["labels as parquet"])
    with pytest.raises(UsageError, match=r"has no labels of 'eval'\. There are: dev, test, train\."):
        open_collection(f"hf:{place},test=eval")
    write_records(place / "qrels" / f"test{SHARD}", [{"query": "e1", "passage": "p1"}])
    with pytest.raises(DataError, match="A label needs query-id and corpus-id; here are: query, passage"):
        open_collection(f"hf:{place}")
    (place / "qrels" / f"test{SHARD}").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet: This is no Parquet file"):
        open_collection(f"hf:{place}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path, str], None]:
    """Return `hub(repository, folder, commit)`, which puts a copy into the hub's own cache, as a download does."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(repository: str, folder: Path, commit: str) -> None:
        place = tmp_path / "hub" / f"datasets--{repository.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text(commit, encoding="utf-8")
        tree = {path.relative_to(folder).as_posix(): {"size": path.stat().st_size} for path in files_below(folder)}
        (place / "trees").mkdir(exist_ok=True)
        (place / "trees" / f"{commit}.json").write_text(json.dumps(tree), encoding="utf-8")

    return add


def test_a_repository_of_the_hub_is_opened_by_its_name(
    tmp_path: Path, folder: Path, hub: Callable[[str, Path, str], None]
) -> None:
    write_repository(tmp_path / "copy", *FORMS["parquet, labels apart"])
    hub("Made/data", tmp_path / "copy", "a" * 40)
    hub("Made/data-qrels", tmp_path / "copy-qrels", "b" * 40)
    data = open_collection("hf:Made/data")
    assert read_all(data) == read_all(open_collection(folder))
    assert data.name == "Made-data"
    inputs = read_manifest(source_of("hf:Made/data")).inputs
    assert inputs == {"Made/data": "a" * 40, "Made/data-qrels": "b" * 40}
    shutil.rmtree(tmp_path / "hub")
    assert open_collection("hf:Made/data").fingerprint == data.fingerprint


def test_a_revision_is_kept_apart(tmp_path: Path, hub: Callable[[str, Path, str], None]) -> None:
    place = write_repository(tmp_path / "copy", *FORMS["json lines"])
    hub("Made/data", place, "a" * 40)
    write_records(place / "corpus.jsonl", [*ROWS, {"_id": "p4", "text": "New."}])
    hub("Made/data", place, "b" * 40)
    assert len(open_collection(f"hf:Made/data@{'a' * 40}").passages) == 3
    assert len(open_collection("hf:Made/data").passages) == 4
    assert open_collection(f"hf:Made/data@{'a' * 40}").name == "Made-data"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Made/nothing", "Made/nothing cannot be read from the hub: .*Check the name"),
        ("a/b/c", "a/b/c cannot be read from the hub: "),
        ("./nothing", "There is no data set './nothing' on the hub and no such folder"),
        ("", "'hf:' names no data set"),
    ],
)
def test_what_the_hub_does_not_have_is_told(
    hub: Callable[[str, Path, str], None], own_cache: Path, name: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        open_collection(f"hf:{name}")
    assert files_below(own_cache) == []


def test_labels_apart_that_cannot_be_reached_are_not_taken_for_missing(
    tmp_path: Path, hub: Callable[[str, Path, str], None]
) -> None:
    hub("Made/data", write_repository(tmp_path / "copy", "corpus.jsonl", "queries.jsonl", None), "a" * 40)
    with pytest.raises(UsageError, match="Made/data-qrels cannot be read from the hub"):
        open_collection("hf:Made/data")


# --- both -------------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@settings(max_examples=15)
@given(st.dictionaries(st.from_regex(r"[a-z0-9]{1,6}", fullmatch=True), st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_any_text_comes_back_from_parquet_and_json_lines(tmp_path: Path, corpus: dict[str, tuple[str, str]]) -> None:
    rows = [{"_id": key, "title": title, "text": text} for key, (title, text) in corpus.items()]
    expected = [
        Passage(key, title.replace("\0", " "), text.replace("\0", " ")) for key, (title, text) in corpus.items()
    ]
    for suffix in ("jsonl", "parquet"):
        place = tmp_path / suffix
        shutil.rmtree(place, ignore_errors=True)
        write_records(place / f"corpus.{suffix}", rows)
        write_records(place / f"queries.{suffix}", QUESTIONS)
        assert read_all(open_collection(f"hf:{place}"))[0] == expected


def test_a_folder_is_opened_as_a_folder(folder: Path, own_cache: Path) -> None:
    assert named.find_data(folder, own_cache) == folder
    assert named.find_data("c:/data", own_cache) == Path("c:/data")


def test_opening_a_folder_loads_neither_library() -> None:
    code = "import sys, pairdr.collection; print({'ir_datasets', 'huggingface_hub', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_empty_metadata_is_left_out() -> None:
    assert make_row("1", "t", "", {"a": "", "b": None, "c": [], "d": 0}) == {
        "_id": "1",
        "text": "t",
        "metadata": {"d": 0},
    }
