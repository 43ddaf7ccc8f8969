"""Answer recall: the cases that the papers' matchers decide, a naive matcher beside ours, and the files of answers."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from conftest import WriteBeir, write_lines
from hypothesis import given
from hypothesis import strategies as st

from pairdr import answers as module
from pairdr.answers import MEASURES, find_first_hits, join_tokens, measure_answers, read_answers
from pairdr.artefact import read_manifest
from pairdr.cli import main
from pairdr.collection import Collection, open_collection
from pairdr.errors import DataError, PairdrError, UsageError
from pairdr.evaluate import read_evaluation
from pairdr.files import hash_file
from pairdr.formats import write_trec_run
from pairdr.measures import mean_measures
from pairdr.records import Query, Run

MODES = ("dpr", "rocketqa")


def make_run(ranked: Mapping[str, Sequence[str]]) -> Run:
    return Run.from_mapping({query: [(p, -float(rank)) for rank, p in enumerate(ids)] for query, ids in ranked.items()})


def open_texts(folder: Path, write_beir: WriteBeir, texts: Mapping[str, str | tuple[str, str]]) -> Collection:
    first = next(iter(texts))
    return open_collection(write_beir(folder, texts, {"q": "who"}, {"test": {"q": {first: 1}}}))


# --- the matcher ------------------------------------------------------------------------------------------------------

HINDI = "\u0939\u093f\u0928\u094d\u0926\u0940"

# what is tried: text of the passage, answer, found by the rules of DPR, and of RocketQA
CASES = {
    "the same words": ("It was Ada Lovelace who wrote it.", "Ada Lovelace", True, True),
    "another case": ("IT WAS ADA LOVELACE.", "ada lovelace", True, True),
    "an accent, composed here and decomposed there": ("by Beyonce\u0301 Knowles", "Beyonc\u00e9", True, True),
    "an accent that the text lacks": ("by Beyonce Knowles", "Beyonc\u00e9", False, False),
    "a word with marks": (f"{HINDI} is spoken", HINDI, True, True),
    "a part of a word": ("the party was long", "art", False, False),
    "words with another between": ("New and old York", "New York", False, False),
    "words in another order": ("York, New", "New York", False, False),
    "words over a line break": ("in New\nYork City", "New  York", True, True),
    "the last words": ("it is in New York", "New York", True, True),
    "the beginning of an answer at the end": ("it is in New", "New York", False, False),
    "signs that stand apart in the text": ("a growth of 3 . 5 %", "3.5%", True, True),
    "signs that the text lacks": ("rock n roll", "rock 'n' roll", False, False),
    "signs between words of the text": ("the song AC/DC", "AC DC", False, False),
    "a sign alone": ("what does C# mean", "#", True, True),
    "dots that the text has": ("he joined the U.S. Army", "U.S.", True, True),
    "dots of which the text lacks the last": ("he joined the U.S Army", "U.S.", False, True),
    "dots that the text lacks": ("he joined the US Army", "U.S.", False, False),
    "a dot at the beginning": ("written in net", ".NET", False, True),
    "a format character that no one sees": ("New\u200b York", "New York", True, True),
    "digits of another script": ("in \u0661\u0669\u0669\u0660", "\u0661\u0669\u0669\u0660", True, True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_a_run_of_the_texts_tokens(tmp_path: Path, write_beir: WriteBeir, name: str) -> None:
    text, answer, *expected = CASES[name]
    passages = open_texts(tmp_path / "data", write_beir, {"p": text}).passages
    found = [
        measure_answers(make_run({"q": ["p"]}), {"q": (answer,)}, passages, ["answer_recall@1"], mode) for mode in MODES
    ]
    assert [bool(values["answer_recall@1"]["q"]) for values in found] == expected


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_in_the_title_alone_is_a_miss(tmp_path: Path, write_beir: WriteBeir, mode: str) -> None:
    texts = {"title": ("Ada Lovelace", "She wrote it."), "text": ("She", "Ada Lovelace wrote it.")}
    passages = open_texts(tmp_path / "data", write_beir, texts).passages
    first = find_first_hits(make_run({"q": ["title", "text"]}), {"q": ("Ada Lovelace",)}, passages, 10, mode)
    assert first == {"q": 2}


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_without_a_token_is_nowhere(tmp_path: Path, write_beir: WriteBeir, mode: str) -> None:
    passages = open_texts(tmp_path / "data", write_beir, {"p": "...", "empty": ""}).passages
    run = make_run({"q": ["p", "empty"]})
    assert find_first_hits(run, {"q": ("", "\u200b")}, passages, 5, mode) == {}
    assert find_first_hits(run, {"q": ("", ".")}, passages, 5, "dpr") == {"q": 1}
    assert find_first_hits(run, {"q": ("", ".")}, passages, 5, "rocketqa") == {}


SIGNS = "abAB9.'-#\u00e9\u0301\u03a3\u03c3\u03c2\u0130\ufb01\u4e2d\u0e01\u0e34 \n\t\u00a0\u200b"
TEXTS = st.text(SIGNS, max_size=24)


def cut_tokens(text: str) -> list[str]:
    """Return the tokens by walking the characters and their categories."""
    tokens: list[str] = []
    inside = False
    for sign in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(sign)[0]
        if kind in "LNM" and inside:
            tokens[-1] += sign
        elif kind not in "ZC":
            tokens.append(sign)
        inside = kind in "LNM"
    return [token.lower() for token in tokens]


def holds(text: str, answer: str) -> bool:
    """Return whether the answer's tokens stand in a row in the text's, by trying every place."""
    tokens, wanted = cut_tokens(text), cut_tokens(answer)
    places = range(len(tokens) - len(wanted) + 1)
    return bool(wanted) and any(tokens[at : at + len(wanted)] == wanted for at in places)


@given(TEXTS)
def test_tokens_are_those_of_their_categories(text: str) -> None:
    assert join_tokens(text) == f" {' '.join(cut_tokens(text))} "


@given(data=st.data())
def test_first_hits_are_those_of_a_naive_matcher(
    tmp_path_factory: pytest.TempPathFactory, write_beir: WriteBeir, data: st.DataObject
) -> None:
    texts = {f"p{at}": text for at, text in enumerate(data.draw(st.lists(TEXTS, min_size=1, max_size=5)))}
    words = st.one_of(TEXTS, st.sampled_from([part for text in texts.values() for part in [text, *text.split()]]))
    run = {f"q{at}": data.draw(st.permutations(sorted(texts))) for at in range(data.draw(st.integers(1, 3)))}
    accepted = {query: tuple(data.draw(st.lists(words, min_size=1, max_size=2))) for query in run}
    mode, depth = data.draw(st.sampled_from(MODES)), data.draw(st.integers(1, 6))
    expected = {}
    for query, ids in run.items():
        wanted = [answer.strip(".").lower() if mode == "rocketqa" else answer for answer in accepted[query]]
        ranks = [rank for rank, p in enumerate(ids[:depth], 1) if any(holds(texts[p], answer) for answer in wanted)]
        expected |= {query: ranks[0]} if ranks else {}
    passages = open_texts(tmp_path_factory.mktemp("data"), write_beir, texts).passages
    assert find_first_hits(make_run(run), accepted, passages, depth, mode) == expected


# --- the measure ------------------------------------------------------------------------------------------------------

CORPUS = {f"p{number}": f"passage {number} tells of nothing" for number in range(30)} | {
    "p7": "it was Ada",
    "p9": "Ada",
}
RUN = make_run({"a": [f"p{n}" for n in range(30)], "b": ["p9", "p1"], "c": ["p1"], "empty": [], "other": ["p2"]})
ANSWERS = {"a": ("Ada",), "b": ("Bob", "Ada"), "c": ("Ada",), "empty": ("Ada",)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, write_beir: WriteBeir) -> Collection:
    queries = {"a": "who was it", "b": "who", "c": "who else", "empty": "who", "other": "what"}
    folder = write_beir(tmp_path_factory.mktemp("corpus"), CORPUS, queries, {"test": {"a": {"p7": 1}}})
    return open_collection(folder)


def test_recall_is_the_share_of_the_questions_that_have_answers(corpus: Collection) -> None:
    values = measure_answers(RUN, ANSWERS, corpus.passages, ["answer_recall@1", "answer_recall@7", "answer_recall@8"])
    assert values["answer_recall@1"] == {"a": 0, "b": 1, "c": 0, "empty": 0}
    assert mean_measures(values) == {"answer_recall@1": 0.25, "answer_recall@7": 0.25, "answer_recall@8": 0.5}


def test_a_run_that_lacks_questions_is_refused(corpus: Collection) -> None:
    with pytest.raises(DataError, match=r"The run lacks 2 of 6 questions, such as 'x'\. Search for all"):
        measure_answers(RUN, ANSWERS | {"x": ("Ada",), "y": ("Ada",)}, corpus.passages)


def test_answers_to_no_question_measure_nothing(corpus: Collection) -> None:
    with pytest.raises(DataError, match="No question has answers"):
        measure_answers(RUN, {}, corpus.passages)


def test_a_passage_that_the_corpus_lacks_is_refused(corpus: Collection) -> None:
    with pytest.raises(DataError, match="There is no id 'gone'"):
        measure_answers(make_run({"a": ["gone"]}), {"a": ("Ada",)}, corpus.passages)


@pytest.mark.parametrize("names", [["RR@10"], ["answer_recall"], ["answer_recall@0"], ["answer_recall@5.5"], []])
def test_other_measures_are_refused(corpus: Collection, names: list[str]) -> None:
    with pytest.raises(UsageError, match="Answers do not measure"):
        measure_answers(RUN, ANSWERS, corpus.passages, names)


def test_a_passage_is_tokenised_once_and_only_if_it_was_found(
    corpus: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(module, "join_tokens", lambda text: seen.append(text) or join_tokens(text))
    run = make_run({"a": ["p9", "p3", "p4"], "b": ["p3", "p9", "p5"]})
    find_first_hits(run, {"a": ("x",), "b": ("y",)}, corpus.passages, 2, "dpr")
    assert sorted(text for text in seen if text in CORPUS.values()) == sorted([CORPUS["p3"], CORPUS["p9"]])


# --- files of answers -------------------------------------------------------------------------------------------------

LINES = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=12).map(str.strip)
ANSWER_LISTS = st.lists(LINES, min_size=1, max_size=3)
QUESTIONS = st.lists(LINES.filter(bool), min_size=1, max_size=5)


def write_dpr(path: Path, rows: Sequence[tuple[str, Sequence[str]]]) -> Path:
    stream = io.StringIO()
    csv.writer(stream, delimiter="\t", lineterminator="\n").writerows((text, repr(list(list_))) for text, list_ in rows)
    path.write_text(stream.getvalue(), encoding="utf-8")
    return path


@given(QUESTIONS, st.data())
def test_dprs_file_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject
) -> None:
    rows = [(text, data.draw(ANSWER_LISTS)) for text in texts]
    path = write_dpr(tmp_path_factory.mktemp("dpr") / "nq-test.qa.csv", rows)
    asked = [Query(f"q{at}", text) for at, text in enumerate(texts)]  # equal questions in the order of their lines
    assert read_answers(path, asked) == {f"q{at}": tuple(accepted) for at, (_, accepted) in enumerate(rows)}


@given(QUESTIONS, st.data())
def test_json_lines_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], data: st.DataObject
) -> None:
    rows = {query_id: data.draw(ANSWER_LISTS) for query_id in ids}
    path = tmp_path_factory.mktemp("jsonl") / "answers.jsonl"
    write_lines(path, (json.dumps({"_id": query_id, "answers": accepted}) for query_id, accepted in rows.items()))
    assert read_answers(path) == {query_id: tuple(accepted) for query_id, accepted in rows.items()}


def test_rocketqas_file_has_an_answer_a_column(tmp_path: Path) -> None:
    write_lines(tmp_path / "nq.tsv", ["7\tAda\tAda Lovelace", "9\t[Bob]"])
    assert read_answers(tmp_path / "nq.tsv") == {"7": ("Ada", "Ada Lovelace"), "9": ("[Bob]",)}


def test_ids_that_are_numbers_are_strings(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ['{"_id": 7, "answers": ["Ada"]}'])
    assert read_answers(tmp_path / "a.jsonl") == {"7": ("Ada",)}


def test_a_list_is_data_and_never_run(tmp_path: Path) -> None:
    place = tmp_path / "made"
    write_lines(tmp_path / "a.csv", [f"who\t[__import__('pathlib').Path({str(place)!r}).touch()]"])
    with pytest.raises(DataError, match=r"a\.csv:1: No answers here"):
        read_answers(tmp_path / "a.csv", [Query("q", "who")])
    assert not place.exists()


BROKEN = {
    "no answers": ("a.jsonl", ['{"_id": "q", "answers": ["x"]}', '{"_id": "r"}'], "a.jsonl:2: No answers here"),
    "an empty list": ("a.jsonl", ['{"_id": "q", "answers": []}'], "a.jsonl:1: No answers here"),
    "a number": ("a.jsonl", ['{"_id": "q", "answers": [3]}'], "a.jsonl:1: No answers here"),
    "no id": ("a.jsonl", ['{"answers": ["x"]}'], 'a.jsonl:1: "_id" is missing'),
    "an id twice": ("a.jsonl", ['{"_id": "q", "answers": ["x"]}'] * 2, "a.jsonl:2: Question q stands twice"),
    "an id alone": ("a.tsv", ["q"], "a.tsv:1: No answers here"),
    "a broken list": ("a.tsv", ["who\t['x']", "who\t['x'"], "a.tsv:2: No answers here"),
    "a string for a list": ("a.tsv", ["who\t['x']", "who\t'x'"], "a.tsv:2: No answers here"),
    "a column too many": ("a.tsv", ["who\t['x']\tmore"], "a.tsv:1: No answers here"),
    "a question that nobody asked": ("a.tsv", ["what\t['x']"], "a.tsv:1: The run lacks the question 'what'"),
    "a question asked once": ("a.tsv", ["who\t['x']"] * 2, "a.tsv:2: The run lacks the question 'who'"),
    "nothing": ("a.jsonl", [], "a.jsonl: There are no answers here"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    file, lines, message = BROKEN[name]
    write_lines(tmp_path / file, lines)
    with pytest.raises(PairdrError) as caught:
        read_answers(tmp_path / file, [Query("q", "who")])
    assert message in str(caught.value)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(corpus: Collection, tmp_path: Path) -> Path:
    """Return a folder with a run and its answers in two forms."""
    write_trec_run(tmp_path / "run.trec", make_run({"a": ["p1", "p7"], "b": ["p9"], "c": ["p1"]}), "hand")
    write_lines(
        tmp_path / "answers.jsonl", (json.dumps({"_id": q, "answers": list(ANSWERS[q])}) for q in ("a", "b", "c"))
    )
    write_dpr(tmp_path / "qa.csv", [("who was it", ("Ada",)), ("who", ("Bob", "Ada")), ("who else", ("Ada",))])
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    return int(end.value.code or 0), output + errors


@pytest.mark.parametrize("file", ["answers.jsonl", "qa.csv"])
def test_a_run_is_evaluated_by_answers(
    capsys: pytest.CaptureFixture[str], corpus: Collection, place: Path, file: str
) -> None:
    common = (place / "run.trec", "--answers", place / file, "--data", corpus.source)
    code, output = call(capsys, "evaluate", *common, "-o", place / "out")
    assert (code, output.split()) == (0, [part for name in MEASURES for part in (name, "0.6667")])
    values = read_evaluation(place / "out")
    assert values["answer_recall@5"] == {"a": 1, "b": 1, "c": 0}
    manifest = read_manifest(place / "out", "evaluation")
    assert manifest.facts == {"means": mean_measures(values), "queries": 3}
    assert manifest.inputs == {"answers": hash_file(place / file), "collection": corpus.fingerprint}
    assert manifest.options["answer_mode"] == "dpr"
    more = ("--measures", "answer_recall@1", "--answer-mode", "rocketqa", "--on-duplicate", "first", "--json")
    assert json.loads(call(capsys, "evaluate", *common, *more)[1]) == {"answer_recall@1": pytest.approx(1 / 3)}


def test_questions_that_the_folder_lacks_are_read_from_a_file(
    capsys: pytest.CaptureFixture[str], corpus: Collection, place: Path
) -> None:
    """As DPR's file goes: its first column is searched for, its second one judges."""
    questions = [line.split("\t")[0] for line in (place / "qa.csv").read_text(encoding="utf-8").splitlines()]
    write_lines(place / "test.txt", questions)
    write_trec_run(place / "test.trec", make_run({"test.txt:1": ["p7"], "test.txt:2": ["p1"], "test.txt:3": []}), "x")
    common = (place / "test.trec", "--answers", place / "qa.csv", "--data", corpus.source)
    code, output = call(capsys, "evaluate", *common, "--queries", place / "test.txt")
    assert (code, "The run lacks the question 'who else'" in output) == (1, True)  # no line of TREC, no question
    append_line(place / "test.trec", "test.txt:3 Q0 p9 1 1 x\n")
    code, output = call(capsys, "evaluate", *common, "--queries", place / "test.txt", "--json")
    assert (code, json.loads(output)["answer_recall@5"]) == (0, pytest.approx(2 / 3))
    assert "There is no id 'test.txt:1'" in call(capsys, "evaluate", *common)[1]


def test_only_the_questions_of_a_split_count_where_one_is_named(
    capsys: pytest.CaptureFixture[str], corpus: Collection, place: Path
) -> None:
    """As a folder has answers for all of its questions, and a run is of some."""
    write_trec_run(place / "test.trec", make_run({"a": ["p1", "p7"]}), "hand")
    common = (place / "test.trec", "--answers", place / "answers.jsonl", "--data", corpus.source, "--json")
    assert "The run lacks 2 of 3 questions" in call(capsys, "evaluate", *common)[1]
    measured = json.loads(call(capsys, "evaluate", *common, "--split", "test")[1])
    assert measured == dict.fromkeys(MEASURES, 1.0)
    assert "The split 'dev' has no labels" in call(capsys, "evaluate", *common, "--split", "dev")[1]


def append_line(path: Path, line: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + line, encoding="utf-8")


def test_evaluations_by_answers_are_compared(
    capsys: pytest.CaptureFixture[str], corpus: Collection, place: Path
) -> None:
    write_trec_run(place / "other.trec", make_run({"a": ["p7"], "b": ["p1"], "c": ["p9"]}), "hand")
    for name in ("run", "other"):
        common = ("--answers", place / "answers.jsonl", "--data", corpus.source, "-o", place / name)
        assert call(capsys, "evaluate", place / f"{name}.trec", *common)[0] == 0
    measures = ("--measures", "answer_recall@20", "answer_recall@5", "--resamples", "200")
    code, output = call(capsys, "compare", f"run={place / 'run'}", f"other={place / 'other'}", *measures)
    assert code == 0, output
    assert "better on 1 queries, equal on 1, worse on 1" in output


def test_a_run_is_measured_by_labels_or_by_answers(
    capsys: pytest.CaptureFixture[str], corpus: Collection, place: Path
) -> None:
    run, labels = place / "run.trec", corpus.source / "qrels" / "test.tsv"
    answers = ("--answers", place / "answers.jsonl")
    for arguments in ((), answers, ("--data", corpus.source), (labels, *answers, "--data", corpus.source)):
        code, output = call(capsys, "evaluate", run, *arguments)
        assert code == 2
        assert "by labels (QRELS), or by --answers in the passages of --data" in output
    assert call(capsys, "evaluate", run, *answers, "--data", corpus.source, "--measures", "RR@10")[0] == 2
    assert call(capsys, "evaluate", run, labels, "--measures", "answer_recall@20")[0] == 2


@pytest.mark.parametrize(
    "options", [("--split", "test"), ("--answer-mode", "rocketqa"), ("--queries", "q.txt"), ("--on-duplicate", "first")]
)
def test_labels_have_no_use_for_options_of_answers(
    capsys: pytest.CaptureFixture[str], corpus: Collection, place: Path, options: tuple[str, str]
) -> None:
    code, output = call(capsys, "evaluate", place / "run.trec", corpus.source / "qrels" / "test.tsv", *options)
    assert code == 2
    assert options[0] in output
    assert "Leave them out: labels say which queries count; for a split, name its own labels." in output
