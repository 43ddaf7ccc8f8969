"""Marks written back: every mark of every label, in labels and examples, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from auditing import KEYS, OTHERS, POOL, QRELS, TRAIN, Plant, make_row, positive_of, write_rows, write_table

from pairdr.artefact import verify_artefact
from pairdr.collection import open_collection
from pairdr.config import (
    DataConfig,
)
from pairdr.errors import DataError, UsageError
from pairdr.findings import (
    Finding,
    write_audit,
    write_marks,
)
from pairdr.formats import Examples, read_qrels
from pairdr.label import SOURCES
from pairdr.records import Example
from pairdr.relabel import apply_audit

if TYPE_CHECKING:
    from conftest import WriteBeir


@pytest.fixture
def plant(tmp_path: Path, write_beir: WriteBeir) -> Plant:
    return Plant(tmp_path, write_beir)


# --- written back -----------------------------------------------------------------------------------------------------


class Apply:
    """Writes marks back to the planted data: `apply({(label, query, passage): mark})` gives labels and example rows."""

    def __init__(self, plant: Plant) -> None:
        self.plant, self.facts, self.number = plant, dict[str, Any](), 0
        self.rows: dict[str, list[Example]] = {}

    def __call__(
        self, marks: Mapping[tuple[str, str, str], str], rows: Sequence[Example] = (), **options: Any
    ) -> dict[str, dict[str, int]]:
        collection = self.plant.open(**options)
        rows = rows or [make_row("t0"), make_row("t1")]
        examples = write_rows(self.plant.folder / "examples", collection, labelled=rows, pseudo=self.plant.pseudo)
        path = self.plant.folder / "marked.tsv"
        given = [
            Finding(
                kind="contradicted" if label == "pseudo" else "near_copy", label=label, query_id=q, passage_id=p, mark=m
            )
            for (label, q, p), m in marks.items()
        ]
        write_audit(path, given)
        self.number += 1
        self.output = self.plant.folder / f"new{self.number}"
        self.facts = apply_audit(collection, path, self.output, examples=examples)
        new = Path(f"{self.output}.examples")
        self.rows = {name: list(Examples.open(new / f"{name}.arrow")) for name in SOURCES}
        self.collection = open_collection(self.output, DataConfig(**options))
        return self.collection.labels("train")


@pytest.fixture
def apply(plant: Plant) -> Apply:
    return Apply(plant)


def test_a_relabelled_negative_becomes_a_positive(apply: Apply) -> None:
    labels = apply({("negative", "t0", "p21"): "relabel"})
    assert labels == QRELS["train"] | {"t0": {"p0": 1, "p21": 1}}
    first, second, third = apply.rows["labelled"]
    assert (first.positive_id, first.negative_ids) == ("p0", ("p20", "p22", "p23"))
    assert first.negative_scores == pytest.approx((0.1, 0.08, 0.07))
    assert second == replace(first, positive_id="p21", positive_score=pytest.approx(0.09))
    assert first.known_positive_ids == ("p0", "p21")
    assert third == make_row(
        "t1", negative_scores=pytest.approx((0.1, 0.09, 0.08, 0.07)), positive_score=third.positive_score
    )
    assert apply.facts["labels"] == {
        "made positive": 1,
        "made not relevant": 0,
        "judged as negative": 0,
        "removed": 0,
        "queries left without a positive": 0,
    }


def test_an_unlabelled_copy_becomes_a_positive(apply: Apply) -> None:
    assert apply({("unlabelled", "t0", "p39"): "relabel"})["t0"] == {"p0": 1, "p39": 1}
    assert [row.positive_id for row in apply.rows["labelled"]] == ["p0", "p39", "p1"]
    assert math.isnan(apply.rows["labelled"][1].positive_score)


def test_an_accepted_negative_is_judged(apply: Apply) -> None:
    assert apply({("negative", "t0", "p21"): "accept"})["t0"] == {"p0": 1, "p21": 0}
    assert [row.negative_ids for row in apply.rows["labelled"]] == [OTHERS[:4]] * 2
    assert apply.facts["labels"]["judged as negative"] == 1


def test_a_dropped_negative_is_used_neither_way(apply: Apply) -> None:
    assert apply({("negative", "t0", "p21"): "drop"}) == QRELS["train"]
    first = apply.rows["labelled"][0]
    assert (first.negative_ids, first.known_positive_ids) == (("p20", "p22", "p23"), ("p0", "p21"))


def test_a_relabelled_positive_is_judged_and_its_row_goes(apply: Apply) -> None:
    apply.plant.qrels["train"]["t0"]["p39"] = 1
    both = ("p0", "p39")
    rows = [make_row("t0", positive_id=p, known_positive_ids=both) for p in both]
    assert apply({("positive", "t0", "p0"): "relabel"}, rows)["t0"] == {"p0": 0, "p39": 1}
    (row,) = apply.rows["labelled"]
    assert (row.positive_id, row.known_positive_ids) == ("p39", ("p39",))
    assert apply.facts["labels"]["made not relevant"] == 1


def test_a_dropped_positive_is_used_neither_way(apply: Apply) -> None:
    apply.plant.qrels["train"]["t0"]["p39"] = 1
    both = ("p0", "p39")
    rows = [make_row("t0", positive_id=p, known_positive_ids=both) for p in both]
    assert apply({("positive", "t0", "p0"): "drop"}, rows)["t0"] == {"p39": 1}
    (row,) = apply.rows["labelled"]
    assert (row.positive_id, set(row.known_positive_ids)) == ("p39", set(both))
    assert apply.facts["labels"]["removed"] == 1


def test_a_query_without_a_positive_joins_the_pool(apply: Apply) -> None:
    labels = apply({("positive", "t0", "p0"): "relabel", ("positive", "t1", "p1"): "drop"})
    assert list(labels) == TRAIN[2:]
    assert set(apply.collection.pool) == {*POOL, "t0", "t1"}
    assert apply.rows["labelled"] == []
    assert apply.facts["labels"]["queries left without a positive"] == 2


def test_a_wrong_positive_and_a_right_negative_change_places(apply: Apply) -> None:
    labels = apply({("positive", "t0", "p0"): "relabel", ("negative", "t0", "p21"): "relabel"})
    assert labels["t0"] == {"p0": 0, "p21": 1}
    assert [(row.positive_id, row.known_positive_ids) for row in apply.rows["labelled"]] == [
        ("p21", ("p21",)),
        ("p1", ("p1",)),
    ]


@pytest.mark.parametrize("mark", ["relabel", "drop"])
def test_a_pseudo_label_that_is_not_accepted_goes(apply: Apply, mark: str) -> None:
    assert apply({("pseudo", "u1", "p11"): mark, ("pseudo", "u2", "p12"): "accept"}) == QRELS["train"]
    assert [row.query_id for row in apply.rows["pseudo"]] == ["u0", "u2", "u3"]
    assert apply.facts["examples"] == {"labelled": 2, "pseudo": 3, "plain": 0}


def test_accepted_positives_change_nothing(apply: Apply) -> None:
    assert apply({("positive", "t0", "p0"): "accept"}) == QRELS["train"]
    assert [row.positive_id for row in apply.rows["labelled"]] == ["p0", "p1"]


def test_hidden_labels_stay_what_they_are(apply: Apply) -> None:
    hidden = next(iter(apply.plant.open(hide_labels=0.5).hidden))
    apply.plant.pseudo.append(make_row(hidden, "pseudo", positive_id="p20"))
    assert apply({("pseudo", hidden, "p20"): "drop"}, hide_labels=0.5) == QRELS["train"]
    assert hidden in apply.collection.hidden


def test_all_else_of_the_data_is_as_it_was(apply: Apply) -> None:
    apply({("negative", "t0", "p21"): "relabel"})
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/dev.tsv", "qrels/test.tsv"):
        assert (apply.output / name).read_bytes() == (apply.plant.folder / "data" / name).read_bytes()
    manifest = verify_artefact(apply.output)
    assert (manifest.kind, manifest.facts["marks"]) == ("beir", {"relabel": 1})
    examples = verify_artefact(f"{apply.output}.examples")
    assert examples.inputs["collection"] == apply.collection.fingerprint
    assert (examples.facts["labelled"], apply.facts["examples"]["labelled"]) == (3, 3)


def test_answers_go_along(apply: Apply) -> None:
    path = apply.plant.open().source / "answers.jsonl"
    path.write_text('{"_id": "t0", "answers": ["yes"]}\n', encoding="utf-8")
    apply({("negative", "t0", "p21"): "relabel"})
    assert (apply.output / "answers.jsonl").read_bytes() == path.read_bytes()


def test_a_made_dev_split_stays_the_same(apply: Apply) -> None:
    del apply.plant.qrels["dev"]
    before = apply.plant.open(dev_queries=1)
    first, *_ = before.qrels("train")
    labels = apply({("positive", first, positive_of(first)): "drop"}, [make_row(first)], dev_queries=1)
    assert apply.collection.qrels("dev") == before.qrels("dev")
    assert set(labels) == set(before.qrels("train")) - {first}


def test_labels_alone_hold_what_they_can(plant: Plant, tmp_path: Path) -> None:
    collection, path = plant.open(), tmp_path / "marked.tsv"
    write_audit(path, [Finding(**KEYS | {"query_id": "t0", "passage_id": "p21"}, mark="drop")])
    with pytest.raises(UsageError, match=r"The marks change no label\. Marks of pseudo labels and dropped negatives"):
        apply_audit(collection, path, tmp_path / "new")
    write_marks(path, {("t0", "p21"): "relabel"})
    apply_audit(collection, path, tmp_path / "new")
    assert read_qrels(tmp_path / "new" / "qrels" / "train.tsv")["t0"] == {"p0": 1, "p21": 1}
    assert not (tmp_path / "new.examples").exists()
    write_marks(path, {("t0", "p21"): ""})
    with pytest.raises(UsageError, match=r"marked\.tsv: No row is marked"):
        apply_audit(collection, path, tmp_path / "new")


@pytest.mark.parametrize(
    ("label", "query_id", "passage_id", "message"),
    [
        ("negative", "t9", "p1", "There is no query 't9' in these data."),
        ("negative", "t0", "1", "There is no passage '1' in these data."),
        ("negative", "u0", "p1", "Query 'u0' has no training label."),
        ("negative", "e0", "p1", "Query 'e0' has no training label."),
        ("positive", "d0", "p30", "Query 'd0' has no training label."),
        ("negative", "t0", "p0", "Passage 'p0' is a positive of query 't0'."),
        ("positive", "t0", "p1", "Passage 'p1' is no positive of query 't0'."),
        ("pseudo", "t0", "p0", "Query 't0' is not in the pool."),
    ],
)
def test_marks_that_do_not_fit_the_data_are_refused(
    plant: Plant, tmp_path: Path, label: str, query_id: str, passage_id: str, message: str
) -> None:
    row = f"relabel\tnear_copy\t{label}\t{query_id}\t{passage_id}"
    path = write_table(tmp_path / "a.tsv", "accept\tnear_copy\tnegative\tt0\tp21", row)
    with pytest.raises(DataError) as refused:
        apply_audit(plant.open(), path, tmp_path / "new")
    assert str(refused.value).startswith(f"{path}:3: {message} Use the data, the examples and the options of the audit")
    assert not (tmp_path / "new").exists()


def test_a_mark_of_what_is_no_pseudo_label_is_refused(apply: Apply) -> None:
    with pytest.raises(DataError, match=r"marked\.tsv:2: Passage 'p12' is no pseudo positive of query 'u1'"):
        apply({("pseudo", "u1", "p12"): "drop"})
    assert not apply.output.exists()


def test_what_people_put_into_the_new_data_or_changed_there_is_kept(plant: Plant, tmp_path: Path) -> None:
    collection, new = plant.open(), tmp_path / "new"
    path = write_table(tmp_path / "a.tsv", "relabel\tnear_copy\tnegative\tt0\tp21")
    apply_audit(collection, path, new)
    (new / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"new: This folder also holds notes\.txt, which would be lost with it\."):
        apply_audit(collection, path, new)
    (new / "notes.txt").unlink()
    labels = new / "qrels" / "train.tsv"
    labels.write_text(labels.read_text(encoding="utf-8").replace("p21\t1", "p22\t1"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"new: qrels/train\.tsv was changed since it was written, and would be"):
        apply_audit(collection, path, new)
    assert read_qrels(labels)["t0"] == {"p0": 1, "p22": 1}


def test_nothing_is_replaced_that_is_read(plant: Plant, tmp_path: Path) -> None:
    collection = plant.open()
    examples = plant.sources(collection).examples
    path = write_table(tmp_path / "a.tsv", "relabel\tnear_copy\tnegative\tt0\tp21")
    with pytest.raises(UsageError, match="data: This would replace what is read"):
        apply_audit(collection, path, plant.folder / "data")
    with pytest.raises(UsageError, match="examples: This would replace what is read"):
        apply_audit(collection, path, tmp_path / "new", examples=examples, examples_output=examples)


def test_where_examples_cannot_be_renewed_nothing_is_written(plant: Plant, tmp_path: Path) -> None:
    collection = plant.open()
    examples = plant.sources(collection).examples
    path = write_table(tmp_path / "a.tsv", "relabel\tnear_copy\tnegative\tt0\tp21")
    taken = tmp_path / "new.examples" / "thesis.txt"
    taken.parent.mkdir()
    taken.touch()
    with pytest.raises(UsageError, match=r"new\.examples: This folder holds other files"):
        apply_audit(collection, path, tmp_path / "new", examples=examples)
    broken = examples / "pseudo.arrow"
    broken.write_bytes(bytes(broken.stat().st_size))
    with pytest.raises(DataError, match=r"pseudo\.arrow: No examples in Arrow form here"):
        apply_audit(collection, path, tmp_path / "new", examples=examples, examples_output=tmp_path / "other")
    assert sorted(place.name for place in tmp_path.glob("*")) == ["a.tsv", "data", "examples", "new.examples"]


def test_marks_are_not_written_back_twice(apply: Apply) -> None:
    apply({("negative", "t0", "p21"): "relabel"})
    with pytest.raises(DataError, match=r"marked\.tsv:2: Passage 'p21' is a positive of query 't0'"):
        apply_audit(apply.collection, apply.plant.folder / "marked.tsv", apply.plant.folder / "again")
