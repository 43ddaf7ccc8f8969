"""What people say: labels of results, which become data, and marks of audited labels, which stay in their file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import KEY, QUESTION, Running, check_error, make_place, run_service

from pairdr.errors import DataError, UsageError
from pairdr.files import hold_lock
from pairdr.findings import KINDS, MARKS, Finding, read_audit, write_audit
from pairdr.formats import QUERY_KEYS, read_qrels, read_texts
from pairdr.serve import labels as labels_module
from pairdr.serve.failures import ApiError
from pairdr.serve.forms import FeedbackForm
from pairdr.serve.labels import Feedback, Review

if TYPE_CHECKING:
    from conftest import Parts


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, toy: Path, toy_parts: Parts) -> Path:
    """Return a place that nobody changes."""
    return make_place(tmp_path_factory.mktemp("place"), toy, toy_parts.encoder)


def read_labels(folder: Path) -> dict[tuple[str, str], int]:
    """Return {(question, passage): relevance} as another program reads it."""
    texts = {query_id: text for _, (query_id, text) in read_texts(folder / "queries.jsonl", QUERY_KEYS)}
    qrels = read_qrels(folder / "qrels" / "train.tsv")
    rows = [(texts[query_id], *row) for query_id, judged in qrels.items() for row in judged.items()]
    return {(text, passage_id): relevance for text, passage_id, relevance in rows}


# --- labels of results ------------------------------------------------------------------------------------------------


def test_what_people_say_of_results_is_written_as_labels(kept: Path, toy_parts: Parts, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "feedback"
    with run_service(kept, toy_parts.start, feedback=folder) as running:
        assert running.client.get("/settings").json()["feedback"] is True

        def say(query: str, passage_id: str, relevant: bool | None) -> int:
            body = {"query": query, "passage_id": passage_id, "relevant": relevant}
            answer = running.client.post("/feedback", json=body)
            assert answer.status_code == 200, answer.text
            return int(answer.json()["labels"])

        assert say(QUESTION, "calder-river", True) == 1
        assert say(QUESTION, "selby-river", False) == 2
        assert say("  Which river RUNS\nthrough calder ", "calder-bridge", True) == 3  # the same words: one question
        assert say("another 東京 🙂\twith\n lines", "calder-river", True) == 4
        assert say(QUESTION, "selby-river", True) == 4
        assert say(QUESTION, "calder-bridge", None) == 3
        assert say(QUESTION, "calder-bridge", None) == 3
    expected = {
        (QUESTION, "calder-river"): 1,
        (QUESTION, "selby-river"): 1,
        ("another 東京 🙂\twith\n lines", "calder-river"): 1,
    }
    assert read_labels(folder) == expected
    asked = {text for _, (_, text) in read_texts(folder / "queries.jsonl", QUERY_KEYS)}
    assert asked == {QUESTION, "another 東京 🙂\twith\n lines"}
    with run_service(kept, toy_parts.start, feedback=folder) as running:  # what is there is kept
        body = {"query": QUESTION, "passage_id": "calder-river", "relevant": None}
        assert running.client.post("/feedback", json=body).json() == {"labels": 2}
    assert len(read_labels(folder)) == 2


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"passage_id": "no-such"}, "invalid_value"),
        ({"passage_id": "../../etc/passwd"}, "invalid_value"),
        ({"passage_id": ""}, "invalid_value"),
        ({"passage_id": "calder-river\n"}, "invalid_value"),
        ({"query": " "}, "invalid_value"),
        ({"query": "nul \u0000"}, "invalid_value"),
        ({"query": "half \ud800"}, "invalid_value"),
        ({"query": "a" * 20_001}, "limit_exceeded"),
        ({"relevant": 1}, "invalid_value"),
        ({"relevant": "true"}, "invalid_value"),
    ],
)
def test_what_is_no_label_is_refused_and_not_written(
    kept: Path, toy_parts: Parts, tmp_path: Path, body: dict[str, Any], code: str
) -> None:
    sent = json.dumps({"query": QUESTION, "passage_id": "calder-river", "relevant": True, **body})
    with run_service(kept, toy_parts.start, feedback=tmp_path / "f") as running:
        answer = running.client.post("/feedback", content=sent, headers={"content-type": "application/json"})
        check_error(answer, 422, code)
        missing = {"query": QUESTION, "passage_id": "calder-river"}  # neither yes, nor no, nor taken back
        check_error(running.client.post("/feedback", json=missing), 422, "invalid_value")
    assert not (tmp_path / "f" / "queries.jsonl").exists()


def test_labels_need_a_key_where_there_are_keys(kept: Path, toy_parts: Parts, tmp_path: Path) -> None:
    body = {"query": QUESTION, "passage_id": "calder-river", "relevant": True}
    with run_service(kept, toy_parts.start, feedback=tmp_path / "f", keys=[KEY]) as running:
        assert running.client.post("/feedback", json=body).status_code == 200
        del running.client.headers["Authorization"]
        check_error(running.client.post("/feedback", json=body), 401, "missing_key")


def test_without_the_option_nobody_is_asked(kept: Path, toy_parts: Parts) -> None:
    with run_service(kept, toy_parts.start) as running:
        for method, path in (("POST", "/feedback"), ("GET", "/audit"), ("POST", "/audit")):
            check_error(running.client.request(method, path, json={}), 404, "not_found")


def test_two_services_do_not_write_to_one_folder(tmp_path: Path) -> None:
    first = Feedback(tmp_path)
    with pytest.raises(UsageError, match="Another service writes there"):
        Feedback(tmp_path)
    first.label("a", "p", True)
    first.close()
    second = Feedback(tmp_path)
    assert second.label("b", "p", True) == 2
    second.close()


def test_what_a_service_writes_until_it_ends_is_known_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gets the folder reads it after the one before has left it."""
    first = Feedback(tmp_path)

    def let_first_end(folder: Path, **options: Any) -> Any:
        first.label("a", "p", True)
        first.close()
        return hold_lock(folder, **options)

    monkeypatch.setattr(labels_module, "hold_lock", let_first_end)
    second = Feedback(tmp_path)
    assert second.label("b", "p", True) == 2
    second.close()
    assert len(read_labels(tmp_path)) == 2


def test_a_folder_that_is_refused_is_held_no_longer(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").touch()
    with pytest.raises(UsageError, match="Choose a folder of its own"):
        Feedback(tmp_path)
    with hold_lock(tmp_path, wait=False):
        pass


def test_other_data_are_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.jsonl.gz").touch()
    (tmp_path / "questions").mkdir()
    line = '{"_id": "q1", "text": "a", "metadata": {"kind": "b"}}\n'
    (tmp_path / "questions" / "queries.jsonl").write_text(line, encoding="utf-8")
    for name in ("data", "questions"):
        with pytest.raises(UsageError, match="Choose a folder of its own"):
            Feedback(tmp_path / name)
    assert (tmp_path / "questions" / "queries.jsonl").read_text(encoding="utf-8") == line
    assert not (tmp_path / "data" / "qrels").exists()


def test_labels_that_come_at_once_are_all_written(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda number: feedback.label(f"q{number % 5}", f"p{number}", True), range(40)))
    feedback.close()
    assert sorted(counts) == list(range(1, 41))
    assert len(read_labels(tmp_path)) == 40


def test_a_label_that_is_taken_back_leaves_a_folder_that_opens(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path)
    feedback.label("a", "p", True)
    assert feedback.label("a", "p", None) == 0
    feedback.close()
    again = Feedback(tmp_path)
    assert again.label("b", "p", False) == 1
    again.close()


def test_there_is_a_most_of_labels_and_of_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "MOST_LABELS", 2)
    feedback = Feedback(tmp_path)
    feedback.label("a", "p", True)
    feedback.label("b", "p", True)
    before = (tmp_path / "queries.jsonl").read_bytes()
    with pytest.raises(ApiError, match="There are 2 labels") as error:
        feedback.label("c", "p", True)
    assert (error.value.status, error.value.code) == (409, "limit_exceeded")
    assert feedback.label("b", "p", False) == 2  # another word on a known one is none more
    for number in range(5):  # what says nothing is not kept
        assert feedback.label(f"nothing {number}", "p", None) == 2
    assert (tmp_path / "queries.jsonl").read_bytes() == before
    assert feedback.label("b", "p", None) == 1
    assert feedback.label("c", "p", True) == 2
    feedback.close()


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)


@given(st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), max_size=5))
def test_every_label_that_a_form_lets_in_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[str, str, bool]]
) -> None:
    folder, count = tmp_path_factory.mktemp("said"), 0
    feedback = Feedback(folder)
    for query, passage_id, relevant in said:
        try:
            form = FeedbackForm(query=query, passage_id=passage_id, relevant=relevant)
        except ValueError:
            continue
        count = feedback.label(form.query, form.passage_id, form.relevant)
    feedback.close()
    again = Feedback(folder)
    again.close()
    assert sum(map(len, again._qrels.values())) == count
    assert again._qrels == feedback._qrels


@pytest.mark.parametrize("content", ["{", '{"_id": "a"}\n', "\xff"])
def test_labels_that_cannot_be_read_are_not_written_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "queries.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError):
        Feedback(tmp_path)
    assert (tmp_path / "queries.jsonl").read_bytes() == content.encode("latin-1")
    (tmp_path / "queries.jsonl").unlink()
    Feedback(tmp_path).close()  # nor is the folder kept locked


# --- marks of audited labels ------------------------------------------------------------------------------------------


def make_findings() -> list[Finding]:
    return [
        Finding(
            rank=number + 1,
            kind=KINDS[number % 2],
            label="negative",
            query_id=f"q{number}",
            query=f"question {number}",
            passage_id="=p",  # which a spreadsheet takes for a formula
            passage="<b>text</b>",
            teacher_score=0.5 * number,
            suggestion="look",
        )
        for number in range(7)
    ]


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    """Return the folder of an audit."""
    (tmp_path / "audit").mkdir()
    write_audit(tmp_path / "audit" / "audit.tsv", make_findings())
    return tmp_path / "audit"


@pytest.fixture
def reviewed(kept: Path, toy_parts: Parts, audit: Path) -> Iterator[Running]:
    with run_service(kept, toy_parts.start, audit=audit) as running:
        yield running


def list_ranks(answer: dict[str, Any]) -> list[int]:
    return [finding["rank"] for finding in answer["findings"]]


def test_findings_are_listed_a_part_at_a_time(reviewed: Running) -> None:
    assert reviewed.client.get("/settings").json()["audit"] is True
    whole = reviewed.client.get("/audit").json()
    assert {key: whole[key] for key in ("total", "marked", "start")} == {"total": 7, "marked": 0, "start": 0}
    assert whole["findings"] == [vars(finding) for finding in make_findings()]
    assert list_ranks(reviewed.client.get("/audit?start=2&count=3").json()) == [3, 4, 5]
    assert list_ranks(reviewed.client.get("/audit?start=6&count=1000").json()) == [7]
    assert list_ranks(reviewed.client.get(f"/audit?start={10**30}").json()) == []
    some = reviewed.client.get(f"/audit?kind={KINDS[1]}").json()
    assert (some["total"], list_ranks(some)) == (3, [2, 4, 6])
    assert reviewed.client.get("/audit?kind=other").json()["total"] == 0
    for query in ("start=-1", "count=0", "count=1001", "unmarked=perhaps", "start=a"):
        check_error(reviewed.client.get(f"/audit?{query}"), 422, "invalid_value")


@pytest.mark.parametrize("query", ["foo=1", "start=0&start=1", "kind=near_copy&kind=near_copy", "Count=3"])
def test_parameters_of_the_list_that_mean_nothing_are_refused(reviewed: Running, query: str) -> None:
    check_error(reviewed.client.get(f"/audit?{query}"), 422, "invalid_value")


def test_a_mark_is_written_into_the_file_and_seen(reviewed: Running, audit: Path) -> None:
    for number, mark in enumerate(MARKS):
        body = {"query_id": f"q{number}", "passage_id": "=p", "mark": mark}
        assert reviewed.client.post("/audit", json=body).json() == {"total": 7, "marked": number + 1}
    assert [finding.mark for finding in read_audit(audit)] == [*MARKS, "", "", "", ""]
    left = reviewed.client.get("/audit?unmarked=true").json()
    assert (left["total"], left["marked"], list_ranks(left)) == (7, 3, [4, 5, 6, 7])
    body = {"query_id": "q0", "passage_id": "=p", "mark": ""}
    assert reviewed.client.post("/audit", json=body).json() == {"total": 7, "marked": 2}
    write_audit(audit / "audit.tsv", make_findings()[:2])  # somebody edits it elsewhere
    assert reviewed.client.get("/audit").json()["total"] == 2


@pytest.mark.parametrize(
    "body",
    [
        {"query_id": "q9"},
        {"passage_id": "p"},
        {"query_id": ""},
        {"mark": "perhaps"},
        {"mark": None},
        {"mark": "drop "},
        {"more": 1},
        {"query_id": "../q1"},
    ],
)
def test_what_is_no_mark_is_refused_and_not_written(reviewed: Running, audit: Path, body: dict[str, Any]) -> None:
    before = (audit / "audit.tsv").read_bytes()
    answer = reviewed.client.post("/audit", json={"query_id": "q1", "passage_id": "=p", "mark": "drop", **body})
    said = check_error(answer, 422, "invalid_value")
    assert str(audit) not in said
    assert (audit / "audit.tsv").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"mark\tkind\n", b"\xff", None])
def test_a_file_that_was_broken_meanwhile_is_said_so(reviewed: Running, audit: Path, content: bytes | None) -> None:
    path = audit / "audit.tsv"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    body = {"query_id": "q1", "passage_id": "=p", "mark": "drop"}
    for answer in (reviewed.client.get("/audit"), reviewed.client.post("/audit", json=body)):
        assert str(audit) not in check_error(answer, 409, "conflict")
    assert content is None or path.read_bytes() == content
    write_audit(path, make_findings())
    assert reviewed.client.get("/audit").json()["total"] == 7


def test_a_number_that_is_none_is_null(reviewed: Running, audit: Path) -> None:
    path = audit / "audit.tsv"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("\t0.5\t", "\tnan\t").replace("\t1\t", "\tinf\t"), encoding="utf-8")
    answer = reviewed.client.get("/audit")
    found = json.loads(answer.text, parse_constant=pytest.fail)
    assert found["findings"][1]["teacher_score"] is None


def test_an_audit_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no such file"):
        Review(tmp_path / "audit")
    (tmp_path / "audit.tsv").write_text("mark\n", encoding="utf-8")
    with pytest.raises(DataError, match="column 'kind' is missing"):
        Review(tmp_path)
    shutil.rmtree(tmp_path)
