"""The report on a data set: what would corrupt training is an error, what is worth a look a warning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from pairdr.artefact import read_manifest
from pairdr.check import CheckReport, check_collection, fingerprint_start, require_sound
from pairdr.collection import open_collection
from pairdr.config import DataConfig, ModelConfig
from pairdr.errors import DataError

CORPUS = {"p1": ("Rivers", "The Lune is a river."), "p2": "A market on Monday.", "p3": "An old bridge."}
QUERIES = {"t1": "which river", "t2": "which market", "d1": "which bridge", "e1": "what is old", "u1": "what else"}
QRELS = {"train": {"t1": {"p1": 1}, "t2": {"p2": 1}}, "dev": {"d1": {"p3": 1}}, "test": {"e1": {"p3": 1}}}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, write_beir: Callable[..., Path]) -> Write:
    """Return `write(corpus=, queries=, qrels=)`, which adds to a small sound data set."""

    def write_data(corpus: dict | None = None, queries: dict | None = None, qrels: dict | None = None) -> Path:
        return write_beir(
            tmp_path / "data", CORPUS | (corpus or {}), QUERIES | (queries or {}), QRELS if qrels is None else qrels
        )

    return write_data


def check(folder: Path, config: DataConfig | None = None, **model: object) -> CheckReport:
    """Check a folder; the corpus' own folder stands in for a start model without a tokenizer."""
    options = ModelConfig(**{"start": str(folder)} | model)
    report = check_collection(open_collection(folder, config, strict=False), options)
    if "start" not in model:
        report.warnings = [text for text in report.warnings if "tokenizer.json" not in text]
    return report


def append(path: Path, *rows: dict) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def test_sound_data_has_neither_errors_nor_warnings(write: Write) -> None:
    report = check(write())
    assert (report.errors, report.warnings) == ([], [])


def test_a_passage_id_that_occurs_twice_is_an_error(write: Write) -> None:
    folder = write()
    append(folder / "corpus.jsonl", {"_id": "p1", "text": "once more"})
    assert check(folder).errors == ["1 passage ids occur twice, such as 'p1'"]


def test_a_query_id_that_occurs_twice_is_an_error(write: Write) -> None:
    folder = write()
    append(folder / "queries.jsonl", {"_id": "t2", "text": "once more"})
    assert check(folder).errors == ["1 query ids occur twice, such as 't2'"]


def test_a_label_for_an_unknown_passage_is_an_error(write: Write) -> None:
    errors = check(write(qrels=QRELS | {"dev": {"d1": {"p3": 1, "gone": 1}}})).errors
    assert errors == ["qrels/dev.tsv names 1 passage ids that corpus.jsonl does not have, such as 'gone'"]


def test_a_label_for_an_unknown_query_is_an_error(write: Write) -> None:
    errors = check(write(qrels=QRELS | {"test": {"gone": {"p3": 1}}})).errors
    assert errors == ["qrels/test.tsv names 1 query ids that queries.jsonl does not have, such as 'gone'"]


def test_all_errors_are_listed_at_once(write: Write) -> None:
    folder = write(qrels=QRELS | {"test": {"gone": {"p3": 1, "lost": 1}}})
    append(folder / "corpus.jsonl", {"_id": "p1", "text": "once more"})
    assert len(check(folder).errors) == 3


def test_an_empty_passage_is_counted_and_warned_of(write: Write) -> None:
    report = check(write(corpus={"p4": " ... ", "p5": ("", "")}))
    assert report.facts["empty passages"] == 2
    assert "2 passages are empty" in report.warnings
    assert report.errors == []


def test_passages_with_the_same_text_but_for_case_and_punctuation_are_counted(write: Write) -> None:
    report = check(write(corpus={"p4": ("RIVERS", "the lune is a river"), "p5": "An old... BRIDGE", "p6": "a bridge"}))
    assert report.facts["passages with the text of another"] == 2
    assert report.warnings == ["2 passages have the same text as another"]


def test_queries_with_the_same_text_are_counted(write: Write) -> None:
    report = check(write(queries={"u2": "Which river?", "u3": "WHAT else"}))
    assert report.facts["queries with the text of another"] == 2
    assert report.warnings == ["2 queries have the same text as another"]


def test_an_empty_labelled_query_is_an_error(write: Write) -> None:
    assert check(write(queries={"t1": " "})).errors == ["1 labelled queries are empty, such as 't1'"]


def test_an_empty_query_without_labels_only_stays_out_of_the_pool(write: Write) -> None:
    report = check(write(queries={"u2": " "}))
    assert report.errors == []
    assert report.facts["pool"] == 1


def test_training_queries_that_copy_a_test_query_are_counted_and_kept_out(write: Write) -> None:
    report = check(write(queries={"t1": "What is OLD?"}))
    assert report.facts["training queries that copy a dev or test query"] == 1
    assert report.facts["train queries"] == 1
    assert "1 training queries that copy a dev or test query are kept out of training" in report.warnings


def test_pool_queries_that_copy_a_dev_query_are_counted_and_kept_out(write: Write) -> None:
    report = check(write(queries={"u2": "Which bridge?"}))
    assert report.facts["pool queries that copy a dev or test query"] == 1
    assert report.facts["pool"] == 1
    assert "1 pool queries that copy a dev or test query are kept out of training" in report.warnings


def test_labels_per_query_count_what_is_relevant(write: Write) -> None:
    report = check(write(qrels=QRELS | {"train": {"t1": {"p1": 1, "p2": 2, "p3": 0}, "t2": {"p2": 1}}}))
    assert report.facts["train labels per query"] == 1.5
    assert report.facts["test labels per query"] == 1.0


def test_the_pool_holds_the_queries_without_labels_and_those_of_further_files(write: Write, tmp_path: Path) -> None:
    more = tmp_path / "more.txt"
    more.write_text("how old is it\nwho built it\n", encoding="utf-8")
    assert check(write()).facts["pool"] == 1
    assert check(write(), DataConfig(unlabelled=(more,))).facts["pool"] == 3


def test_hidden_labels_move_queries_into_the_pool(write: Write) -> None:
    facts = check(write(), DataConfig(hide_labels=0.5)).facts
    assert (facts["hidden labels"], facts["pool"], facts["train queries"]) == (1, 2, 1)


def test_a_missing_test_split_is_a_warning(write: Write) -> None:
    report = check(write(qrels={name: QRELS[name] for name in ("train", "dev")}))
    assert report.warnings == ["there is no test split: the table is measured on dev"]
    assert report.errors == []


def test_no_training_labels_at_all_are_an_error(write: Write) -> None:
    report = check(write(qrels={name: QRELS[name] for name in ("dev", "test")}))
    assert report.errors == ["the split 'train' has no labels"]


def test_a_training_query_without_a_relevant_passage_is_an_error(write: Write) -> None:
    report = check(write(qrels=QRELS | {"train": {"t1": {"p1": 0}, "t2": {"p2": 1}}}))
    assert report.errors == ["1 train queries have no label above 0, such as 't1'"]


def test_a_test_query_without_a_relevant_passage_is_a_warning(write: Write) -> None:
    report = check(write(qrels=QRELS | {"test": {"e1": {"p3": 0}}}))
    assert report.errors == []
    assert report.warnings == ["1 test queries have no label above 0, such as 'e1'"]


def test_an_empty_corpus_is_an_error(write: Write) -> None:
    folder = write()
    (folder / "corpus.jsonl").write_text("", encoding="utf-8")
    assert "corpus.jsonl has no passage" in check(folder).errors


def test_the_shares_of_cut_texts_are_those_of_the_tokenizer(toy: Path, tiny_model: Path) -> None:
    collection = open_collection(toy)
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    tokenizer.no_truncation()
    passages = [len(tokenizer.encode(collection.passage_at(row).joined).ids) for row in range(len(collection.passages))]
    texts = collection.queries.table.column("text").to_pylist()
    queries = [len(tokenizer.encode(text).ids) for text in texts]
    lengths = {"passage_length": int(np.median(passages)), "query_length": int(np.median(queries))}

    report = check(toy, start=str(tiny_model), **lengths)

    cut = np.mean(np.array(passages) > lengths["passage_length"])
    assert 0 < cut < 1
    assert report.facts["share of passages cut"] == pytest.approx(cut, abs=1e-4)
    assert report.facts["share of queries cut"] == pytest.approx(
        np.mean(np.array(queries) > lengths["query_length"]), abs=1e-4
    )


def test_many_cut_texts_are_a_warning(toy: Path, tiny_model: Path) -> None:
    report = check(toy, start=str(tiny_model), passage_length=8, query_length=4)
    assert report.warnings == [
        "100% of the passages are longer than 8 tokens and are cut",
        "100% of the queries are longer than 4 tokens and are cut",
    ]


def test_a_start_model_without_a_tokenizer_is_a_warning(toy: Path, tmp_path: Path) -> None:
    report = check(toy, start=str(tmp_path))
    assert report.warnings == [f"no tokenizer.json for {str(tmp_path)!r}: the share of cut texts is not known"]
    assert "share of passages cut" not in report.facts


def test_only_errors_stop_a_run() -> None:
    require_sound(CheckReport(warnings=["3 passages are empty"]), "data")
    with pytest.raises(DataError, match=r"^data: first \(1 more\)\. .*pairdr check"):
        require_sound(CheckReport(errors=["first", "second"]), "data")


def test_the_report_is_published_with_counts(write: Write, tmp_path: Path) -> None:
    folder = write(corpus={"p4": ""})
    report = check_collection(open_collection(folder), ModelConfig(start=str(folder)), tmp_path / "check")
    assert json.loads((tmp_path / "check" / "report.json").read_text(encoding="utf-8")) == vars(report)
    assert read_manifest(tmp_path / "check", "check").facts == {"errors": 0, "warnings": len(report.warnings)}


def test_a_start_folder_is_known_by_its_weights_and_not_by_its_name(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_model.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(tiny_model)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert fingerprint_start(str(copy)) == fingerprint_start(str(tiny_model))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert fingerprint_start(str(copy)) != fingerprint_start(str(tiny_model))


def test_a_hub_name_is_its_own_fingerprint() -> None:
    assert fingerprint_start("some-owner/some-model") == "some-owner/some-model"
