"""An opened data set: ids, splits, the pool, what is kept out of training, the cache."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairdr import collection as module
from pairdr import ids, texts
from pairdr.check import check_collection
from pairdr.collection import find_orphans, find_problems, normalise_text, open_collection
from pairdr.config import DataConfig, ModelConfig
from pairdr.errors import DataError, UsageError
from pairdr.formats import write_qrels
from pairdr.records import Passage, Query

IDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\t\n\r", min_codepoint=1)).map(
    lambda text: f"{text}i"
)
CORPUS = {"p1": ("Rivers", "The Lune is a river."), "p2": "A market on Monday.", "p3": "An old bridge."}


@pytest.fixture
def folder(tmp_path: Path, write_beir: Callable[..., Path]) -> Path:
    """Return a folder with 20 training questions, 2 of dev, 2 of test and 3 in the pool."""
    queries = {f"t{number}": f"train question {number}" for number in range(20)}
    queries |= {"d1": "dev one", "d2": "dev two", "e1": "test one", "e2": "test two"}
    queries |= {"u1": "pool one", "u2": "pool two", "u3": "pool three"}
    train = {f"t{number}": {"p1": 1} for number in range(20)}
    qrels = {"train": train, "dev": {"d1": {"p2": 1}, "d2": {"p3": 1}}, "test": {"e1": {"p1": 1}, "e2": {"p2": 1}}}
    return write_beir(tmp_path / "data", CORPUS, queries, qrels)


def add_line(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def add_query(folder: Path, query_id: str, text: str) -> None:
    add_line(folder / "queries.jsonl", json.dumps({"_id": query_id, "text": text}))


# --- opening ----------------------------------------------------------------------------------------------------------


def test_passages_and_queries_are_found_by_id(folder: Path) -> None:
    data = open_collection(folder)
    assert data.name == "data"
    assert data.passage("p1") == Passage("p1", "Rivers", "The Lune is a river.")
    assert data.query("d2") == Query("d2", "dev two")
    assert (len(data.passages), len(data.queries)) == (3, 27)


def test_a_missing_title_is_empty_and_stays_out_of_the_text(folder: Path) -> None:
    data = open_collection(folder)
    assert data.passage("p2").joined == "A market on Monday."
    assert data.passage("p1").joined == "Rivers The Lune is a river."


def test_passages_are_read_in_the_order_of_the_file(folder: Path) -> None:
    data = open_collection(folder)
    blocks = list(data.read_passages(2))
    assert [len(block) for block in blocks] == [2, 1]
    assert [passage.passage_id for block in blocks for passage in block] == ["p1", "p2", "p3"]
    assert data.passage_at(2).text == "An old bridge."


def test_gzipped_files_open_to_the_same_content(folder: Path) -> None:
    plain = open_collection(folder).fingerprint
    for name in ("corpus", "queries"):
        path = folder / f"{name}.jsonl"
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert open_collection(folder).fingerprint == plain


def test_numbers_as_ids_are_strings_everywhere(tmp_path: Path, write_beir: Callable[..., Path]) -> None:
    folder = write_beir(tmp_path, {"x": "text"}, {}, {"test": {"007": {"12": 1}}})
    (folder / "corpus.jsonl").write_text('{"_id": 12, "text": "a"}\n{"_id": "012", "text": "b"}\n', encoding="utf-8")
    (folder / "queries.jsonl").write_text('{"_id": "007", "text": "q"}\n', encoding="utf-8")
    data = open_collection(folder)
    assert data.passage("12").text == "a"
    assert data.passage("012").text == "b"
    assert data.qrels("test") == {"007": {"12": 1}}


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"{folder}: {name} .* is missing"):
        open_collection(folder)


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent: There is no such folder"):
        open_collection(tmp_path / "absent")


def test_a_broken_line_is_named_and_a_later_opening_of_the_mended_file_works(folder: Path) -> None:
    good = (folder / "corpus.jsonl").read_text(encoding="utf-8")
    add_line(folder / "corpus.jsonl", '{"_id": ')
    with pytest.raises(DataError, match=r"corpus\.jsonl:4: Broken JSON"):
        open_collection(folder)
    (folder / "corpus.jsonl").write_text(good, encoding="utf-8")
    assert len(open_collection(folder).passages) == 3


@given(st.lists(IDS, unique=True, max_size=40))
def test_every_id_is_found_at_its_row_and_no_other_is(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    folder = tmp_path_factory.mktemp("ids")
    (folder / "corpus.jsonl").write_text('{"_id": "p", "text": ""}\n', encoding="utf-8")
    lines = [json.dumps({"_id": text_id, "text": ""}) + "\n" for text_id in ids]
    (folder / "queries.jsonl").write_text("".join(lines), encoding="utf-8")
    table = open_collection(folder).queries
    assert [table.find_row(text_id) for text_id in ids] == list(range(len(ids)))
    assert table.ids_of(np.arange(len(ids))) == ids
    assert all(text_id in table for text_id in ids)
    assert "absent\0" not in table
    assert table.id_rank.tolist() == [sorted(ids).index(text_id) for text_id in ids]


def test_two_ids_with_one_hash_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (texts, ids):
        monkeypatch.setattr(place, "hash_text", lambda text: np.uint64(7))
    data = open_collection(folder)
    assert [data.passage(passage_id).passage_id for passage_id in CORPUS] == list(CORPUS)
    assert "p4" not in data.passages


@pytest.mark.parametrize("choice", ["first", "last"])
def test_of_an_id_that_occurs_twice_the_chosen_one_is_taken(folder: Path, choice: Any) -> None:
    texts = {"p2": ["again", "and again"], "p1": ["once more"]}
    for text_id, more in texts.items():
        for text in more:
            add_line(folder / "corpus.jsonl", json.dumps({"_id": text_id, "text": text}))
    add_query(folder, "u1", "asked again")
    question = open_collection(folder, strict=False).query("u1").text
    data = open_collection(folder, DataConfig(on_duplicate=choice))
    taken = {passage_id: text if isinstance(text, str) else text[1] for passage_id, text in CORPUS.items()}
    taken |= {text_id: more[-1] for text_id, more in texts.items()} if choice == "last" else {}
    assert {p.passage_id: p.text for block in data.read_passages() for p in block} == taken
    assert [data.passages.row_of(data.passages.id_of(row)) for row in range(len(data.passages))] == [0, 1, 2]
    assert data.query("u1").text == ("asked again" if choice == "last" else question)
    warned = check_collection(data, ModelConfig(start="none")).warnings
    assert {f"2 passage ids occur twice: the {choice} is taken", f"1 query ids occur twice: the {choice} is taken"} <= {
        *warned
    }


def test_an_unknown_id_is_a_data_error_that_names_it(folder: Path) -> None:
    with pytest.raises(DataError, match="no id 'p9'"):
        open_collection(folder).passage("p9")


# --- what would corrupt training --------------------------------------------------------------------------------------


def corrupt_twice_passage(folder: Path) -> None:
    add_line(folder / "corpus.jsonl", '{"_id": "p2", "text": "again"}')


def corrupt_twice_query(folder: Path) -> None:
    add_query(folder, "u1", "again")


def corrupt_orphan_passage(folder: Path) -> None:
    add_line(folder / "qrels" / "train.tsv", "t1\tp9\t1")


def corrupt_orphan_query(folder: Path) -> None:
    add_line(folder / "qrels" / "test.tsv", "e9\tp1\t1")


PROBLEMS = {
    corrupt_twice_passage: "1 passage ids occur twice, such as 'p2'",
    corrupt_twice_query: "1 query ids occur twice, such as 'u1'",
    corrupt_orphan_passage: r"qrels/train\.tsv names 1 passage ids that corpus\.jsonl does not have, such as 'p9'",
    corrupt_orphan_query: r"qrels/test\.tsv names 1 query ids that queries\.jsonl does not have, such as 'e9'",
}


@pytest.mark.parametrize("corrupt", PROBLEMS, ids=lambda corrupt: corrupt.__name__)
def test_what_would_corrupt_training_is_refused_and_named(folder: Path, corrupt: Callable[[Path], None]) -> None:
    corrupt(folder)
    with pytest.raises(DataError, match=PROBLEMS[corrupt]) as caught:
        open_collection(folder)
    assert "pairdr check" in str(caught.value)


def test_without_strict_all_problems_are_listed(folder: Path) -> None:
    for corrupt in PROBLEMS:
        corrupt(folder)
    data = open_collection(folder, strict=False)
    assert len(list(find_problems(data))) == len(PROBLEMS)
    assert find_orphans(data, "train", "passage") == ["p9"]
    assert find_orphans(data, "test", "query") == ["e9"]


def test_a_clean_folder_has_no_problems(folder: Path) -> None:
    assert list(find_problems(open_collection(folder, strict=False))) == []


# --- splits and pool --------------------------------------------------------------------------------------------------


def test_an_empty_split_is_refused_by_name(folder: Path) -> None:
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"split 'test' has no labels.* qrels/test\.tsv"):
        open_collection(folder).qrels("test")


def test_a_given_dev_split_is_kept(folder: Path) -> None:
    data = open_collection(folder)
    assert set(data.qrels("dev")) == {"d1", "d2"}
    assert len(data.qrels("train")) == 20


def test_a_dev_split_is_made_of_a_tenth_of_the_training_questions(folder: Path) -> None:
    (folder / "qrels" / "dev.tsv").unlink()
    data = open_collection(folder)
    assert len(data.qrels("dev")) == 2
    assert len(data.qrels("train")) == 18
    assert set(data.qrels("dev")) | set(data.qrels("train")) == {f"t{number}" for number in range(20)}


def test_a_made_dev_split_follows_the_seed(folder: Path) -> None:
    (folder / "qrels" / "dev.tsv").unlink()

    def made(seed: int) -> tuple[str, ...]:
        return tuple(open_collection(folder, DataConfig(data_seed=seed)).qrels("dev"))

    assert made(13) == made(13)
    assert len({made(seed) for seed in range(5)}) > 1


def test_a_made_dev_split_holds_at_most_the_wanted_questions(folder: Path) -> None:
    (folder / "qrels" / "dev.tsv").unlink()
    assert len(open_collection(folder, DataConfig(dev_queries=1)).qrels("dev")) == 1


def test_hidden_labels_leave_training_for_the_pool(folder: Path) -> None:
    whole, data = open_collection(folder), open_collection(folder, DataConfig(hide_labels=0.5))
    assert len(data.hidden) == 10
    assert data.hidden.keys().isdisjoint(data.qrels("train"))
    assert data.hidden | data.qrels("train") == whole.qrels("train")
    assert set(data.pool) == set(whole.pool) | set(data.hidden)


def test_hidden_labels_follow_the_seed(folder: Path) -> None:
    def hidden(seed: int) -> frozenset[str]:
        return frozenset(open_collection(folder, DataConfig(hide_labels=0.5, data_seed=seed)).hidden)

    assert hidden(13) == hidden(13)
    assert hidden(13) != hidden(14)


def test_hidden_labels_never_come_from_dev_or_test(folder: Path) -> None:
    data = open_collection(folder, DataConfig(hide_labels=0.99))
    assert set(data.hidden) <= {f"t{number}" for number in range(20)}
    assert set(data.qrels("dev")) == {"d1", "d2"}


def test_the_pool_is_every_question_that_no_split_names(folder: Path) -> None:
    assert open_collection(folder).pool == ("u1", "u2", "u3")


@pytest.mark.parametrize("split_query", ["dev two", "test one"])
def test_copies_of_dev_and_test_questions_leave_pool_and_training_and_are_counted(
    folder: Path, split_query: str
) -> None:
    add_query(folder, "u4", f"  {split_query.upper()}?")
    add_query(folder, "t20", f"{split_query}!")
    add_line(folder / "qrels" / "train.tsv", "t20\tp1\t1")
    data = open_collection(folder)
    assert data.pool == ("u1", "u2", "u3")
    assert "t20" not in data.qrels("train")
    assert data.removed == {
        "dev queries that copy a test query": 0,
        "training queries that copy a dev or test query": 1,
        "pool queries that copy a dev or test query": 1,
    }


def test_a_dev_question_that_is_in_test_too_is_no_dev_question(folder: Path) -> None:
    add_line(folder / "qrels" / "dev.tsv", "e1\tp1\t1")
    data = open_collection(folder)
    assert "e1" not in data.qrels("dev")
    assert data.removed["dev queries that copy a test query"] == 1


def test_questions_of_further_qrels_files_are_neither_trained_on_nor_in_the_pool(folder: Path) -> None:
    (folder / "qrels" / "validation.tsv").write_text("query-id\tcorpus-id\tscore\nu1\tp1\t1\n", encoding="utf-8")
    add_query(folder, "u4", open_collection(folder).query("u1").text.upper())
    assert open_collection(folder).pool == ("u2", "u3")


def test_held_out_passages_are_read_from_their_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text("p1\np2\n", encoding="utf-8")
    plain, held = open_collection(folder), open_collection(folder, DataConfig(held_out=tmp_path / "held_out.txt"))
    assert held.held_out == {"p1", "p2"}
    assert plain.fingerprint != held.fingerprint
    assert plain.passages_fingerprint == held.passages_fingerprint


@pytest.mark.parametrize("character", ["\t", "\n", "\r"])
def test_an_id_that_would_break_a_qrels_line_is_refused(folder: Path, character: str) -> None:
    add_query(folder, f"u{character}4", "a question")
    with pytest.raises(DataError, match="tab or a line break"):
        open_collection(folder)


def test_a_question_of_two_splits_is_not_trained_on(folder: Path) -> None:
    add_line(folder / "qrels" / "train.tsv", "e1\tp1\t1")
    data = open_collection(folder)
    assert "e1" not in data.qrels("train")
    assert "e1" in data.qrels("test")
    assert "e1" not in data.pool


def test_an_empty_question_is_not_in_the_pool(folder: Path) -> None:
    add_query(folder, "u4", "  ")
    assert "u4" not in open_collection(folder).pool


def test_unlabelled_files_join_the_pool(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("what is it\n\ndev one\n", encoding="utf-8")
    (tmp_path / "more.jsonl").write_text('{"_id": "x1", "text": "why"}\n{"text": "how"}\n', encoding="utf-8")
    data = open_collection(folder, DataConfig(unlabelled=(tmp_path / "more.txt", tmp_path / "more.jsonl")))
    assert data.pool == ("u1", "u2", "u3", "more.txt:1", "x1", "more.jsonl:2")
    assert data.query("more.txt:1").text == "what is it"
    assert data.removed["pool queries that copy a dev or test query"] == 1


def make_feedback(folder: Path, qrels: dict[str, dict[str, int]]) -> Path:
    """Return a folder as `pairdr serve --feedback` writes it."""
    write_qrels(folder / "qrels" / "train.tsv", qrels)
    add_query(folder, "f1", "a question of somebody's own")
    return folder


def test_labelled_folders_join_the_training_questions(folder: Path, tmp_path: Path) -> None:
    more = make_feedback(tmp_path / "feedback", {"f1": {"p2": 1}, "t1": {"p3": 0}})
    plain, found = open_collection(folder), open_collection(folder, DataConfig(labelled=(more,)))
    assert found.qrels("train")["f1"] == {"p2": 1}
    assert found.qrels("train")["t1"] == {"p1": 1, "p3": 0}
    assert found.query("f1").text == "a question of somebody's own"
    assert found.pool == plain.pool
    assert found.fingerprint != plain.fingerprint
    assert found.passages_fingerprint == plain.passages_fingerprint


def test_a_split_may_have_any_name(folder: Path) -> None:
    (folder / "qrels" / "qrels.tsv").write_bytes((folder / "qrels" / "test.tsv").read_bytes())
    found = open_collection(folder)
    assert found.labels("qrels") == found.labels("test") != {}


def test_a_labelled_folder_without_labels_or_questions_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"qrels/train\.tsv is missing"):
        open_collection(folder, DataConfig(labelled=(tmp_path / "feedback",)))
    (make_feedback(tmp_path / "feedback", {}) / "queries.jsonl").unlink()
    with pytest.raises(UsageError, match=r"queries\.jsonl"):
        open_collection(folder, DataConfig(labelled=(tmp_path / "feedback",)))


def test_labels_of_feedback_for_passages_that_are_not_there_are_left_out_and_counted(
    folder: Path, tmp_path: Path
) -> None:
    """A passage that was added through the service is none of the data's."""
    labels = {"f1": {"nowhere": 1, "p2": 1}, "f2": {"nowhere": 1}}
    found = open_collection(folder, DataConfig(labelled=(make_feedback(tmp_path / "feedback", labels),)))
    assert found.qrels("train")["f1"] == {"p2": 1}
    assert "f2" not in found.qrels("train")
    assert found.removed["labels of --labelled for passages that are not there"] == 2
    assert "2 labels of --labelled" in " ".join(check_collection(found, ModelConfig()).warnings)
    assert "labels of --labelled for passages that are not there" not in open_collection(folder).removed


def test_a_missing_unlabelled_file_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.txt: There is no such file.*--unlabelled"):
        open_collection(folder, DataConfig(unlabelled=(tmp_path / "absent.txt",)))


@pytest.mark.parametrize(
    ("one", "other"),
    [("What's this?", "what s this"), ("ﬁne", "FINE"), ("a_b  c", "A b\tc"), ("Ａ１", "a1")],
)
def test_copies_are_compared_by_their_words_alone(one: str, other: str) -> None:
    assert normalise_text(one) == normalise_text(other)


def test_texts_with_other_words_are_no_copies() -> None:
    assert normalise_text("naïve") != normalise_text("naive")


# --- cache and fingerprints -------------------------------------------------------------------------------------------


def count_conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    calls: list[Path] = []
    convert = module._convert

    def counted(inputs: dict[str, Path], staging: module.Staging, *rest: Any) -> None:
        calls.append(staging.path)
        convert(inputs, staging, *rest)

    monkeypatch.setattr(module, "_convert", counted)
    return calls


def test_a_second_opening_converts_nothing(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_conversions(monkeypatch)
    first, second = open_collection(folder), open_collection(folder)
    assert len(calls) == 1
    assert first.fingerprint == second.fingerprint
    assert cache in first.folder.parents


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
def test_a_touched_file_is_converted_again(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls = count_conversions(monkeypatch)
    first = open_collection(folder)
    os.utime(folder / name, ns=(1, 1))
    second = open_collection(folder)
    assert len(calls) == 2
    assert first.fingerprint == second.fingerprint


def test_a_changed_passage_is_seen(folder: Path) -> None:
    first = open_collection(folder)
    add_line(folder / "corpus.jsonl", '{"_id": "p4", "text": "new"}')
    second = open_collection(folder)
    assert second.passage("p4").text == "new"
    assert first.fingerprint != second.fingerprint
    assert first.passages_fingerprint != second.passages_fingerprint


def test_a_changed_label_changes_the_fingerprint_but_not_that_of_the_passages(folder: Path) -> None:
    first = open_collection(folder)
    add_line(folder / "qrels" / "train.tsv", "t0\tp2\t1")
    second = open_collection(folder)
    assert first.fingerprint != second.fingerprint
    assert first.passages_fingerprint == second.passages_fingerprint


def test_a_damaged_cache_is_made_again(folder: Path) -> None:
    cached = open_collection(folder).folder
    os.truncate(cached / "passages.arrow", 10)
    assert open_collection(folder).passage("p3").text == "An old bridge."


def test_options_that_decide_splits_change_the_fingerprint(folder: Path) -> None:
    configs = DataConfig(), DataConfig(hide_labels=0.5), DataConfig(data_seed=1)
    assert len({open_collection(folder, config).fingerprint for config in configs}) == 3


def test_the_toy_data_is_what_its_fixture_says(toy: Path) -> None:
    data = open_collection(toy)
    assert (len(data.passages), len(data.pool)) == (120, 48)
    assert {split: len(data.qrels(split)) for split in ("train", "dev", "test")} == {"train": 48, "dev": 48, "test": 24}
    assert sum(data.removed.values()) == 0
