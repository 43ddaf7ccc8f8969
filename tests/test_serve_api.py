"""The paths of the service, asked over HTTP: what they answer, and what they refuse."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from serving import (
    HEADERS,
    KEY,
    QUESTION,
    Running,
    check_error,
    make_place,
    make_work,
    mark_edition,
    name_version,
    read_metrics,
    read_rows,
    run_service,
    wait_until,
)

from pairdr.artefact import read_manifest
from pairdr.files import hold_lock
from pairdr.lexical import LexicalIndex
from pairdr.parts import find_parts
from pairdr.records import Passage
from pairdr.searcher import Searcher
from pairdr.vectors import VectorStore
from pairdr.versions import write_store

if TYPE_CHECKING:
    from conftest import Parts

Change = Callable[..., Any]
WAYS = ("dense", "bm25", "hybrid")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, toy: Path, toy_parts: Parts) -> Path:
    """Return a place that nobody changes."""
    return make_place(tmp_path_factory.mktemp("place"), toy, toy_parts.encoder)


@pytest.fixture(scope="module")
def asked(kept: Path, toy_parts: Parts) -> Iterator[Running]:
    """Return an open service."""
    with run_service(kept, toy_parts.start) as running:
        yield running


@pytest.fixture
def place(kept: Path, tmp_path: Path) -> Path:
    """Return a copy of the place."""
    for name in ("v", "bm25"):
        shutil.copytree(kept.parent / name, tmp_path / name)
    return tmp_path / "v"


@pytest.fixture
def written(place: Path, toy_parts: Parts) -> Iterator[Running]:
    """Return a service of that copy that takes passages; it looks for other writers' versions only when it writes."""
    with run_service(place, toy_parts.start, keys=[KEY], watch_seconds=3600) as running:
        yield running


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> Path:
    """Return the work folder of a run."""
    return make_work(tmp_path_factory.getbasetemp(), toy, tiny_model)


@pytest.fixture(scope="module")
def worked(work: Path) -> Iterator[Running]:
    """Return a service of it, with its teacher as reranker."""
    with run_service(work, reranker="teacher") as running:
        yield running


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, bare_model: Path) -> Path:
    """Return a cross-encoder that has learned nothing."""
    import torch
    from sentence_transformers import CrossEncoder

    folder = tmp_path_factory.mktemp("judge")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        CrossEncoder(str(bare_model), num_labels=1, device="cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def judged(kept: Path, toy_parts: Parts, judge: Path) -> Iterator[Running]:
    """Return a service with that cross-encoder."""
    with run_service(kept, toy_parts.start, reranker=str(judge)) as running:
        yield running


def list_ids(answer: dict[str, Any], row: int = 0) -> list[str]:
    return [hit["id"] for hit in answer["results"][row]["hits"]]


# --- searching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", WAYS)
def test_a_search_answers_what_a_searcher_does(asked: Running, kept: Path, toy_parts: Parts, mode: str) -> None:
    store = VectorStore(kept)
    searcher = Searcher(store, toy_parts.encoder, words=LexicalIndex(kept.parent / "bm25"))
    expected = searcher.search(QUESTION, 7, mode=mode)
    answer = asked.search(k=7, mode=mode)
    hits = answer["results"][0].pop("hits")
    assert [hit["id"] for hit in hits] == [hit.passage_id for hit in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    found = {hit.passage_id: hit.passage for hit in expected}
    for hit in hits:
        passage = found[hit["id"]]
        assert (hit["title"], hit["text"]) == (passage.title, passage.text)
        assert hit["metadata"] == json.loads(passage.metadata)
        assert set(hit) == {"id", "score", "title", "text", "metadata"}
    assert answer.pop("milliseconds") >= 0
    assert answer == {
        "model": "v",
        "version": name_version(kept),
        "mode": mode,
        "reranked": False,
        "results": [{"query": QUESTION}],
    }


def test_unsaid_things_are_the_documented_ones(asked: Running) -> None:
    answer = asked.search()
    assert (answer["mode"], len(list_ids(answer))) == ("hybrid", 10)
    assert list_ids(answer) == list_ids(asked.search(k=10, mode="auto", rerank=False, filters=[], fold=False))


def test_a_question_in_the_address_is_answered_as_one_in_a_body(asked: Running) -> None:
    parameters = {"q": QUESTION, "k": 4, "mode": "dense", "filter": ["kind=market", "kind=river"], "fold": "true"}
    found = asked.client.get("/search", params={**parameters, "model": "v", "rerank": "false"}).json()
    other = asked.search(k=4, mode="dense", filters=["kind=market", "kind=river"], fold=True, model="v")
    assert found | {"milliseconds": 0} == other | {"milliseconds": 0}
    assert len(list_ids(found)) == 4


def test_several_questions_are_answered_in_order(asked: Running) -> None:
    questions = ["the museum of Ryde", QUESTION, "the museum of Ryde", "Zürich 東京 🙂"]
    answer = asked.client.post("/search", json={"queries": questions, "k": 3}).json()
    assert [result["query"] for result in answer["results"]] == questions
    for row, question in enumerate(questions):
        assert list_ids(answer, row) == list_ids(asked.search(query=question, k=3))


def test_several_questions_in_the_address_are_several_in_a_body(asked: Running) -> None:
    questions = ["the museum of Ryde", QUESTION]
    found = asked.client.get("/search", params={"q": questions, "k": 3}).json()
    other = asked.client.post("/search", json={"queries": questions, "k": 3}).json()
    assert found | {"milliseconds": 0} == other | {"milliseconds": 0}
    assert [result["query"] for result in found["results"]] == questions
    said = check_error(asked.client.get("/search?q=a&q=%20"), 422, "invalid_value")
    assert said.startswith("q.1: ")


@pytest.mark.parametrize("name", ["k", "mode", "rerank", "fold", "model"])
def test_a_parameter_of_one_value_is_given_once(asked: Running, name: str) -> None:
    """Of two values one would be left out, and nobody would notice."""
    value = {"k": "3", "mode": "dense", "rerank": "false", "fold": "true", "model": "v"}[name]
    assert asked.client.get(f"/search?q=a&{name}={value}").status_code == 200
    said = check_error(asked.client.get(f"/search?q=a&{name}={value}&{name}={value}"), 422, "invalid_value")
    assert said == f"{name} is given 2 times. Give it once."


@pytest.mark.parametrize("mode", WAYS)
def test_a_filter_leaves_what_fits(asked: Running, mode: str) -> None:
    both = asked.search(k=100, mode=mode, filters=["kind=river", "kind=market", "edition=1"])
    kinds = [hit["metadata"]["kind"] for hit in both["results"][0]["hits"]]
    assert set(kinds) == {"river", "market"}
    assert len(kinds) == 40 or mode == "bm25"
    assert list_ids(asked.search(mode=mode, filters=["kind=river", "edition=2"])) == []


def test_copies_are_folded(place: Path, toy_parts: Parts) -> None:
    with run_service(place, toy_parts.start, keys=[KEY]) as running:
        rows = [{"_id": f"copy{number}", "text": "a text of which there are copies"} for number in range(5)]
        assert running.client.post("/passages", json={"passages": rows}).status_code == 200
        asked = {"query": rows[0]["text"], "k": 8, "mode": "bm25"}
        assert list_ids(running.search(**asked))[:5] == [row["_id"] for row in rows]
        folded = list_ids(running.search(**asked, fold=True))
        assert len([found for found in folded if found.startswith("copy")]) == 1
        assert running.search(**asked)["results"][0]["hits"][0]["metadata"] == {}


def test_without_words_there_is_dense_search_alone(kept: Path, toy_parts: Parts, tmp_path: Path) -> None:
    vectors = Path(shutil.copytree(kept, tmp_path / "alone"))
    with run_service(vectors, toy_parts.start) as running:
        assert running.search()["mode"] == "dense"
        (model,) = running.client.get("/settings").json()["models"]
        assert (model["modes"], model["default_mode"]) == (["dense"], "dense")
        for mode in ("bm25", "hybrid"):
            answer = running.client.post("/search", json={"query": "a", "mode": mode})
            assert "mode can be: auto, dense" in check_error(answer, 422, "no_words")


def test_an_index_answers_in_place_of_exact_search(kept: Path, toy_parts: Parts, tmp_path: Path) -> None:
    from pairdr.index import build_index
    from pairdr.store_config import IndexConfig

    config = IndexConfig(index_kind="ivf", quantiser="sq8", wanted_recall=0.9, recall_depth=10)
    build_index(VectorStore(kept), config, tmp_path / "index")
    with run_service(kept, toy_parts.start, index=tmp_path / "index") as running:
        assert running.service.shelf.take(None).searcher._index is not None
        assert len(list_ids(running.search(mode="dense", k=5))) == 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"filters": ["colour=red"]}, "No passage has the metadata field 'colour'. There are: edition, kind, number."),
        ({"filters": ["colour"]}, "'colour' is no filter. Write FIELD=VALUE."),
        ({"filters": [""]}, "filters.0: must not be empty."),
        ({"query": "  "}, "query: must not be empty."),
        ({"query": None}, "give either query or queries."),
        ({"queries": ["a"]}, "give either query or queries."),
        ({"query": None, "queries": []}, "queries: "),
        ({"k": 0}, "k: "),
        ({"k": True}, "k: "),
        ({"k": "3"}, "k: "),
        ({"k": 3.5}, "k: "),
        ({"k": float("nan")}, "k: "),
        ({"mode": "fuzzy"}, "mode: "),
        ({"rerank": 1}, "rerank: "),
        ({"depth": 3}, "there is no field 'depth'."),
        ({"query": "half \ud800"}, "query: half a character"),
        ({"query": "a\u0000b"}, "query: "),
        ({"\ud800": 1}, ""),
    ],
)
def test_wrong_values_are_named(asked: Running, body: dict[str, Any], message: str) -> None:
    content = json.dumps({"query": "a", **body})
    answer = asked.client.post("/search", content=content, headers={"content-type": "application/json"})
    said = check_error(answer, 422, "invalid_value")
    assert said.startswith(message), said
    assert "function" not in said  # what stands in our code is nobody's business


@pytest.mark.parametrize("parameters", [{}, {"q": ""}, {"q": "a", "k": "x"}, {"q": "a", "k": "9" * 5000}, {"q": "%00"}])
def test_wrong_parameters_are_refused(asked: Running, parameters: dict[str, str]) -> None:
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    check_error(asked.client.get(f"/search?{query}"), 422, "invalid_value")


def test_parameters_are_named_as_they_are_written(asked: Running) -> None:
    for query, name in (("q=%20", "q: "), ("q=a&filter=b%3Dc&filter=", "filter.1: "), ("q=a&k=0", "k: ")):
        assert check_error(asked.client.get(f"/search?{query}"), 422, "invalid_value").startswith(name)


def test_half_characters_in_an_address_are_replaced(asked: Running) -> None:
    answer = asked.client.get("/search?q=a%ff%ed%a0%80")
    assert answer.status_code == 200
    assert answer.json()["results"][0]["query"].startswith("a\ufffd")


# --- reranking --------------------------------------------------------------------------------------------------------


def test_a_reranker_orders_the_best_fifty_anew(judged: Running, judge: Path) -> None:
    from sentence_transformers import CrossEncoder

    deep = judged.search(k=50, mode="dense")["results"][0]["hits"]
    texts = [f"{hit['title']} {hit['text']}" for hit in deep]
    scores = CrossEncoder(str(judge), device="cpu").predict([(QUESTION, text) for text in texts])
    expected = sorted(zip(scores.tolist(), [hit["id"] for hit in deep], strict=True), key=lambda pair: -pair[0])
    answer = judged.search(k=3, mode="dense", rerank=True)
    hits = answer["results"][0]["hits"]
    assert answer["reranked"] is True
    assert [hit["score"] for hit in hits] == pytest.approx([score for score, _ in expected[:3]], abs=1e-5)
    for hit in hits:
        assert hit == {**next(old for old in deep if old["id"] == hit["id"]), "score": hit["score"]}
    assert len(list_ids(judged.search(k=60, rerank=True, mode="dense"))) == 60


def test_nothing_found_is_nothing_to_rerank(judged: Running, worked: Running) -> None:
    for running in (judged, worked):
        answer = running.search(query="qqqq", mode="bm25", rerank=True)
        assert (answer["reranked"], list_ids(answer)) == (True, [])


def test_a_parameter_that_is_none_is_refused(asked: Running) -> None:
    """A filter with another name would be no filter, and nobody would notice."""
    said = check_error(asked.client.get("/search?q=a&filters=kind=river"), 422, "invalid_value")
    assert said.startswith("'filters' is no parameter. There are: filter, ")


def test_without_a_reranker_none_is_promised(asked: Running) -> None:
    assert asked.client.get("/settings").json()["models"][0]["reranker"] is False
    check_error(asked.client.get("/search?q=a&rerank=true"), 422, "no_reranker")
    body = {"query": "a", "documents": ["b"], "model": "reranker"}
    assert "There is none here" in check_error(asked.client.post("/v1/rerank", json=body), 422, "no_reranker")


def test_the_teacher_of_a_work_folder_reranks_what_is_found_but_no_other_texts(worked: Running) -> None:
    deep = worked.search(k=50, mode="dense")["results"][0]["hits"]
    words = {hit["id"]: hit["score"] for hit in worked.search(k=100, mode="bm25")["results"][0]["hits"]}
    hits = worked.search(k=5, mode="dense", rerank=True)["results"][0]["hits"]
    expected = sorted(((words.get(hit["id"], 0.0), hit["id"]) for hit in deep), key=lambda pair: (-pair[0], pair[1]))
    assert [(pytest.approx(score, abs=1e-5), found) for score, found in expected[:5]] == [
        (hit["score"], hit["id"]) for hit in hits
    ]
    body = {"query": "a", "documents": ["b"]}
    refused = worked.client.post("/v1/rerank", json=body | {"model": "reranker"})
    assert "uses BM25 of the index" in check_error(refused, 422, "no_reranker")
    assert worked.client.post("/v1/rerank", json=body).json()["model"] == "pair"


DOCUMENTS: list[Any] = [
    "The market of Ashford is on Monday.",
    {"text": "The river is called the Lune.", "title": "A river"},
    {"text": "pottery", "id": "of the client"},
]


def test_texts_are_ordered_by_the_models_similarity(asked: Running, kept: Path, toy_parts: Parts) -> None:
    body = {"query": QUESTION, "documents": DOCUMENTS, "model": "v", "return_documents": True, "max_chunks": 3}
    answer = asked.client.post("/v1/rerank", json=body).json()
    passages = [Passage("", "", DOCUMENTS[0]), Passage("", "A river", DOCUMENTS[1]["text"]), Passage("", "", "pottery")]
    scores = toy_parts.encoder.encode_passages(passages) @ toy_parts.encoder.encode_queries([QUESTION])[0]
    assert (answer["model"], answer["version"]) == ("v", name_version(kept))
    assert [result["index"] for result in answer["results"]] == np.argsort(-scores).tolist()
    found = {result["index"]: result["relevance_score"] for result in answer["results"]}
    assert [found[at] for at in range(3)] == pytest.approx(scores.tolist(), abs=1e-5)
    sent = {result["index"]: result["document"] for result in answer["results"]}
    assert sent[0] == {"text": DOCUMENTS[0], "title": ""}
    assert sent[1] == DOCUMENTS[1]
    best = asked.client.post("/v1/rerank", json={"query": QUESTION, "documents": DOCUMENTS, "top_n": 1}).json()
    assert best["results"] == [{key: answer["results"][0][key] for key in ("index", "relevance_score")}]


def test_texts_are_ordered_by_the_reranker_where_there_is_one(judged: Running, judge: Path) -> None:
    from sentence_transformers import CrossEncoder

    texts = [DOCUMENTS[0], "A river The river is called the Lune.", "pottery"]
    scores = CrossEncoder(str(judge), device="cpu").predict([(QUESTION, text) for text in texts])
    answer = judged.client.post("/v1/rerank", json={"query": QUESTION, "documents": DOCUMENTS}).json()
    assert (answer["model"], answer["version"]) == ("reranker", judged.search()["version"])
    assert [result["index"] for result in answer["results"]] == np.argsort(-scores).tolist()
    by_model = judged.client.post("/v1/rerank", json={"query": QUESTION, "documents": DOCUMENTS, "model": "v"}).json()
    assert by_model["model"] == "v"
    check_error(
        judged.client.post("/v1/rerank", json={"query": "a", "documents": ["b"], "model": "w"}), 404, "unknown_model"
    )


def test_equal_texts_keep_their_order(asked: Running) -> None:
    answer = asked.client.post("/v1/rerank", json={"query": "a", "documents": ["same"] * 5}).json()
    assert [result["index"] for result in answer["results"]] == list(range(5))


@pytest.mark.parametrize(
    "body", [{"documents": []}, {"documents": [3]}, {"documents": [""]}, {"documents": [{"title": "a"}]}, {"top_n": 0}]
)
def test_wrong_documents_are_refused(asked: Running, body: dict[str, Any]) -> None:
    answer = asked.client.post("/v1/rerank", json={"query": "a", "documents": ["b"], **body})
    assert "function" not in check_error(answer, 422, "invalid_value")


# --- embeddings, and OpenAI's own client ------------------------------------------------------------------------------


def test_embeddings_are_the_models_vectors(asked: Running, kept: Path, toy_parts: Parts) -> None:
    texts = ["the river of Ashford", "a much longer text " * 40]
    encoder = toy_parts.encoder
    sides: dict[str, tuple[Any, Any]] = {
        "query": (encoder.encode_queries(texts), encoder.tokenize_queries(texts)),
        "document": (
            encoder.encode_passages([Passage("", "", text) for text in texts]),
            encoder.tokenize_passages([Passage("", "", text) for text in texts]),
        ),
    }
    for side, (vectors, tokens) in sides.items():
        answer = asked.client.post("/v1/embeddings", json={"input": texts, "model": "v", "input_type": side}).json()
        count = sum(len(found.input_ids) for found in tokens)
        assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}
        assert (answer["object"], answer["model"], answer["version"]) == ("list", "v", name_version(kept))
        assert [(row["object"], row["index"]) for row in answer["data"]] == [("embedding", 0), ("embedding", 1)]
        assert np.array([row["embedding"] for row in answer["data"]]) == pytest.approx(vectors, abs=1e-5)
    body = {"input": texts, "encoding_format": "base64", "user": "somebody"}  # what means nothing here is left alone
    packed = asked.client.post("/v1/embeddings", json=body).json()["data"]
    found = np.stack([np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4") for row in packed])
    assert found == pytest.approx(sides["document"][0], abs=1e-5)


def test_vectors_are_cut_to_widths_that_were_trained(worked: Running, asked: Running) -> None:
    whole = worked.client.post("/v1/embeddings", json={"input": "river"}).json()["data"][0]["embedding"]
    for width in (8, 16, 32):
        body = {"input": "river", "dimensions": width}
        short = worked.client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
        assert short == pytest.approx(np.array(whole[:width]) / np.linalg.norm(whole[:width]), abs=1e-6)
    for running, width in ((worked, 9), (worked, 64), (asked, 8)):
        refused = running.client.post("/v1/embeddings", json={"input": "river", "dimensions": width})
        assert "was trained for" in check_error(refused, 422, "invalid_value")
    other = worked.client.post("/v1/embeddings", json={"input": "river", "model": "start"}).json()
    assert other["model"] == "start"
    assert other["data"][0]["embedding"] != whole


@pytest.mark.parametrize("value", [[], "", [""], 3, [[1, 2]], None, {"a": "b"}, ["a", 3]])
def test_wrong_inputs_are_refused(asked: Running, value: Any) -> None:
    said = check_error(asked.client.post("/v1/embeddings", json={"input": value}), 422, "invalid_value")
    assert said.startswith("input")
    assert "function" not in said


@pytest.fixture(scope="module")
def locked(kept: Path, toy_parts: Parts) -> Iterator[Running]:
    """Return a service with keys that nobody writes to."""
    with run_service(kept, toy_parts.start, keys=["another-key", KEY], queue_texts=300) as running:
        yield running


def make_openai(running: Running, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)


def test_openais_own_client_gets_embeddings(locked: Running, toy_parts: Parts) -> None:
    texts = ["the river of Ashford", "the market"]
    vectors = toy_parts.encoder.encode_passages([Passage("", "", text) for text in texts])
    with make_openai(locked) as client:
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 32}):
            answer = client.embeddings.create(input=texts, model="v", **options)
            if options.get("encoding_format") != "base64":  # which it hands on as it comes
                assert np.array([row.embedding for row in answer.data]) == pytest.approx(vectors, abs=1e-5)
            assert answer.usage.total_tokens > 0
            assert answer.model == "v"
        one = client.embeddings.create(input=texts[0], model="v", extra_body={"input_type": "query"})
        expected = toy_parts.encoder.encode_queries(texts[:1])[0]
        assert np.array(one.data[0].embedding) == pytest.approx(expected, abs=1e-5)
        assert [model.id for model in client.models.list()] == ["v"]


def test_openais_own_client_knows_our_errors(locked: Running) -> None:
    with make_openai(locked) as client:
        with pytest.raises(openai.NotFoundError, match=r"There is no model 'gpt'\. There are: v") as missing:
            client.embeddings.create(input="a", model="gpt")
        with pytest.raises(openai.UnprocessableEntityError, match="is 257; this service allows at most 256") as many:
            client.embeddings.create(input=["a"] * 257, model="v")
    with make_openai(locked, "wrong") as client, pytest.raises(openai.PermissionDeniedError) as wrong:
        client.embeddings.create(input="a", model="v")
    errors = [(error.value.code, error.value.type) for error in (missing, many, wrong)]
    assert errors == [
        ("unknown_model", "not_found_error"),
        ("limit_exceeded", "invalid_request_error"),
        ("wrong_key", "permission_error"),
    ]


# --- models and settings ----------------------------------------------------------------------------------------------


def read_settings(work: Path, name: str) -> tuple[Any, ...]:
    parts = find_parts(work, system=name)
    return parts.weights, parts.mode, parts.depth, read_manifest(parts.teacher).fingerprint


def test_models_and_settings_say_what_is_served(worked: Running, work: Path) -> None:
    listed = worked.client.get("/v1/models").json()
    rows = [{"id": name, "object": "model", "created": 0, "owned_by": "pairdr"} for name in ("pair", "start")]
    assert listed == {"object": "list", "data": rows}
    settings = worked.client.get("/settings").json()
    assert settings["models"] == [
        {
            "id": name,
            "version": name_version(work / "vectors" / name, work / "bm25", read_settings(work, name)),
            "passages": 120,
            "dimensions": 32,
            "widths": widths,
            "similarity": "cosine",
            "modes": list(WAYS),
            "default_mode": "hybrid",
            "reranker": True,
        }
        for name, widths in (("pair", [8, 16]), ("start", []))
    ]
    assert settings["limits"] == {"k": 100, "texts": 256, "characters": 20000}
    assert [settings[name] for name in ("keys", "feedback", "audit")] == [False, False, False]


def test_a_model_is_asked_by_its_name(worked: Running) -> None:
    answers = {name: worked.search(k=3, model=name, mode="dense") for name in ("pair", "start")}
    assert {name: answer["model"] for name, answer in answers.items()} == {"pair": "pair", "start": "start"}
    assert worked.search(k=3, mode="dense")["version"] == answers["pair"]["version"] != answers["start"]["version"]


@pytest.mark.parametrize(
    "name", ["other", "../pair", "/etc/passwd", "models/pair", "pair%00", "", " pair", "pair.stage1", "x" * 100_000]
)
def test_a_models_name_is_no_path(worked: Running, name: str) -> None:
    for path, body in (("/search", {"query": "a"}), ("/v1/embeddings", {"input": "a"})):
        said = check_error(worked.client.post(path, json={**body, "model": name}), 404, "unknown_model")
        assert len(said) < 400


# --- passages ---------------------------------------------------------------------------------------------------------


def test_passages_are_found_as_soon_as_the_answer_is_there(written: Running, place: Path) -> None:
    before = written.search()["version"]
    row = {"_id": "new", "title": "A title", "text": "unheard words", "metadata": {"kind": "new", "deep": {"a": [1]}}}
    answer = written.client.post("/passages", json={"passages": [row]}).json()
    assert answer["passages"] == 121
    assert answer["version"] == name_version(place) != before
    for mode in ("bm25", "hybrid"):
        found = written.search(query="unheard words", mode=mode, filters=["kind=new"])
        assert found["version"] == answer["version"]
        (hit,) = found["results"][0]["hits"]
        assert {"_id": hit["id"], **{key: hit[key] for key in ("title", "text", "metadata")}} == row
    again = written.client.post("/passages", json={"passages": [row]}).json()
    assert again == answer  # nothing has changed
    changed = written.client.post("/passages", json={"passages": [row | {"text": "others"}]}).json()
    assert (changed["passages"], changed["version"][:2]) == (121, "3-")
    assert list_ids(written.search(query="unheard", mode="bm25")) == []
    gone = written.client.post("/passages/delete", json={"ids": ["new", "new", "calder-river"]}).json()
    assert (gone["passages"], gone["version"][:2]) == (119, "4-")
    assert not {"new", "calder-river"} & set(list_ids(written.search(k=100)))
    assert read_metrics(written.client)['pairdr_index_version{model="v"}'] == 4


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/passages", {"passages": []}, "passages: "),
        ("/passages", {"passages": [{"_id": "a"}]}, "passages.0.text: "),
        ("/passages", {"passages": [{"_id": "a", "text": " "}]}, "passages.0.text: must not be empty."),
        ("/passages", {"passages": [{"_id": "", "text": "a"}]}, "passages.0._id: must not be empty."),
        ("/passages", {"passages": [{"_id": 3, "text": "a"}]}, "passages.0._id: "),
        ("/passages", {"passages": [{"_id": "a\tb", "text": "a"}]}, "passages.0._id: an id has no"),
        ("/passages", {"passages": [{"_id": "a", "text": "half \udfff"}]}, "passages.0.text: half a character"),
        ("/passages", {"passages": [{"_id": "a", "text": "nul \u0000"}]}, "passages.0.text: "),
        ("/passages", {"passages": [{"_id": "a", "text": "a", "title": "\u0000"}]}, "passages.0.title: "),
        ("/passages", {"passages": [{"_id": "a", "text": "a", "more": 1}]}, "passages.0: there is no field 'more'."),
        ("/passages", {"passages": [{"_id": "a", "text": "a", "metadata": [1]}]}, "passages.0.metadata: "),
        ("/passages", {"passages": [{"_id": "a", "text": "a", "metadata": {"x": float("nan")}}]}, "metadata has a num"),
        ("/passages", {"passages": [{"_id": "a", "text": "a", "metadata": {"x": [-float("inf")]}}]}, "metadata has a"),
        ("/passages", {"passages": [{"_id": "a", "text": t} for t in "xy"]}, "The id 'a' occurs twice."),
        ("/passages", {"passages": [{"_id": "a", "text": "x"}] * 2}, "The id 'a' occurs twice."),
        ("/passages/delete", {"ids": []}, "ids: "),
        ("/passages/delete", {"ids": ["calder-river", "no-such"]}, "There is no passage 'no-such' here (1 in all)."),
        ("/passages/delete", {"ids": ["../../etc/passwd"]}, "There is no passage"),
    ],
)
def test_wrong_passages_change_nothing(
    locked: Running, kept: Path, path: str, body: dict[str, Any], message: str
) -> None:
    before = read_manifest(kept)
    content = json.dumps(body)
    answer = locked.client.post(path, content=content, headers={**HEADERS, "content-type": "application/json"})
    said = check_error(answer, 422, "invalid_value")
    assert said.startswith(message), said
    assert "--" not in said  # a way out on the command line is none here
    assert str(kept) not in said
    assert read_manifest(kept) == before


@pytest.mark.parametrize("depth", [100, 300, 600, 900, 990, 5000, 100_000])
def test_deep_metadata_is_stored_or_refused(written: Running, depth: int) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    content = f'{{"passages": [{{"_id": "deep", "text": "deep", "metadata": {nested}}}]}}'
    answer = written.client.post("/passages", content=content, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        check_error(answer, *((400, "invalid_json") if answer.status_code == 400 else (422, "invalid_value")))
    assert written.search(query="deep")["results"][0]["hits"]
    assert depth > 100 or answer.status_code == 200


def test_one_passage_has_to_stay(written: Running, place: Path) -> None:
    ids = [row["_id"] for row in read_rows(place)]
    refused = written.client.post("/passages/delete", json={"ids": ids})
    assert "One has to stay" in check_error(refused, 422, "invalid_value")
    assert written.client.post("/passages/delete", json={"ids": ids[1:]}).json()["passages"] == 1
    for mode in WAYS:
        assert set(list_ids(written.search(query="birkdale bridge ashford", mode=mode))) <= {ids[0]}
    check_error(written.client.post("/passages/delete", json={"ids": ids[:1]}), 422, "invalid_value")
    assert list_ids(written.search(mode="dense")) == ids[:1]


def test_every_edition_is_answered_whole(written: Running, place: Path) -> None:
    for edition in (2, 3):
        rows = mark_edition(read_rows(place), edition)
        version = written.client.post("/passages", json={"passages": rows}).json()["version"]
        answer = written.search(k=50)
        assert answer["version"] == version
        assert {hit["metadata"]["edition"] for hit in answer["results"][0]["hits"]} == {edition}


def test_another_writer_is_waited_for_by_the_client(written: Running, place: Path) -> None:
    store = VectorStore(place)
    row = {"_id": "new", "text": "unheard"}
    with write_store(place, store.dtype, store.encoder):
        check_error(written.client.post("/passages", json={"passages": [row]}), 409, "conflict")
        check_error(written.client.post("/passages/delete", json={"ids": ["calder-river"]}), 409, "conflict")
    assert written.client.post("/passages", json={"passages": [row]}).status_code == 200


def test_passages_of_several_models_are_not_changed(work: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    row = {"_id": "new", "text": "unheard words"}
    with run_service(copy, keys=[KEY]) as running:
        said = check_error(running.client.post("/passages", json={"passages": [row]}), 409, "conflict")
        assert "start with --models pair" in said
    with run_service(copy, keys=[KEY], names=["pair"]) as running:
        with hold_lock(copy):  # a run is at work
            check_error(running.client.post("/passages", json={"passages": [row]}), 409, "conflict")
        assert running.client.post("/passages", json={"passages": [row]}).json()["passages"] == 121
        assert list_ids(running.search(query="unheard words", mode="bm25"))[0] == "new"


def test_writes_come_one_after_another_also_when_their_clients_were_told_that_it_takes_too_long(
    place: Path, toy_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pairdr.serve import shelf

    index_words, inside, most, go = shelf.index_words, [], [], threading.Event()

    def index_slowly(*arguments: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        assert go.wait(30)
        try:
            return index_words(*arguments)
        finally:
            inside.pop()

    monkeypatch.setattr(shelf, "index_words", index_slowly)
    with run_service(place, toy_parts.start, keys=[KEY], request_seconds=0.3, watch_seconds=3600) as running:
        for number in range(2):
            answer = running.client.post("/passages", json={"passages": [{"_id": f"n{number}", "text": "unheard"}]})
            check_error(answer, 504, "timeout")
        go.set()
        wait_until(lambda: running.search(query="unheard", mode="bm25")["version"].startswith("2-"))
        assert most == [1]  # the second one had not begun, and never does
        assert list_ids(running.search(query="unheard", mode="bm25")) == ["n0"]


def test_a_write_whose_words_fail_is_no_success_and_the_next_one_mends_it(
    place: Path, toy_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pairdr.errors import ArtefactError
    from pairdr.serve import shelf

    def fail(*_: Any) -> Any:
        raise ArtefactError("Writing failed: No space left on device.", path=place)

    with run_service(place, toy_parts.start, keys=[KEY], watch_seconds=3600) as running:
        with monkeypatch.context() as patch:
            patch.setattr(shelf, "index_words", fail)
            answer = running.client.post("/passages", json={"passages": [{"_id": "n", "text": "unheard"}]})
            assert str(place) not in check_error(answer, 500, "write_failed")
        assert list_ids(running.search(query="unheard", mode="bm25")) == []
        answer = running.client.post("/passages", json={"passages": [{"_id": "n", "text": "unheard"}]})
        assert (answer.status_code, answer.json()["version"][:2]) == (200, "2-")
        assert list_ids(running.search(query="unheard", mode="bm25")) == ["n"]


def test_words_that_are_indexed_are_not_overtaken_by_another_services(
    place: Path, toy_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the words of an older version would stand beside the vectors of a newer one."""
    from pairdr.serve import shelf

    index_words, begun, go = shelf.index_words, threading.Event(), threading.Event()

    def index_late(*arguments: Any) -> Any:
        if not begun.is_set():
            begun.set()
            assert go.wait(30)
        return index_words(*arguments)

    monkeypatch.setattr(shelf, "index_words", index_late)
    rows = [{"passages": [{"_id": name, "text": "unheard"}]} for name in ("one", "two")]
    with (
        run_service(place, toy_parts.start, keys=[KEY], watch_seconds=0.02) as one,
        run_service(place, toy_parts.start, keys=[KEY], watch_seconds=0.02) as two,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(one.client.post, "/passages", json=rows[0])
        assert begun.wait(30)
        second = two.client.post("/passages", json=rows[1])
        go.set()
        assert first.result().status_code == 200
        check_error(second, 409, "conflict")
        assert two.client.post("/passages", json=rows[1]).status_code == 200
        wait_until(lambda: one.search()["version"] == two.search()["version"])
        assert sorted(list_ids(one.search(query="unheard", mode="bm25"))) == ["one", "two"]
        assert (one.service.shelf.stale, two.service.shelf.stale) == ({}, {})


def test_writes_under_load_are_never_mixed(place: Path, toy_parts: Parts) -> None:
    """Whoever asks meanwhile gets texts of one edition, and that of the version that is named."""
    editions: dict[str, int] = {}
    answers: list[dict[str, Any]] = []
    done = threading.Event()

    def ask(running: Running, number: int) -> None:
        while not done.is_set():
            answers.append(running.search(k=30, mode=WAYS[number]))

    with run_service(place, toy_parts.start, keys=[KEY]) as running, ThreadPoolExecutor(3) as pool:
        editions[running.search()["version"]] = 1
        asking = [pool.submit(ask, running, number) for number in range(3)]
        try:
            for edition in (2, 3, 4):
                rows = mark_edition(read_rows(place), edition)
                answer = running.client.post("/passages", json={"passages": rows})
                editions[answer.json()["version"]] = edition
                count = len(answers)
                wait_until(lambda count=count: len(answers) > count + 6)  # type: ignore[misc]
        finally:
            done.set()
        for future in asking:
            future.result()
    assert {answer["version"] for answer in answers} == set(editions)
    for answer in answers:
        hits = answer["results"][0]["hits"]
        assert {hit["metadata"]["edition"] for hit in hits} == {editions[answer["version"]]}
        assert {hit["text"].split(" Edition ")[1] for hit in hits} == {f"{editions[answer['version']]}."}


def test_a_version_that_another_process_publishes_is_picked_up(place: Path, toy_parts: Parts) -> None:
    from pairdr.versions import delete_passages

    vectors = Path(shutil.copytree(place, place.parent / "alone" / "v"))
    with run_service(vectors, toy_parts.start, watch_seconds=0.02) as running:
        assert running.client.get("/ready").json() == {"status": "ready"}
        delete_passages(vectors, ["calder-river"])
        wait_until(lambda: running.search()["version"].startswith("2-"))
        manifest = vectors / "manifest.json"
        good = manifest.read_bytes()
        manifest.write_text("{", encoding="utf-8")
        wait_until(lambda: "stale" in running.client.get("/ready").json())
        assert running.client.get("/ready").json()["stale"] == {"v": "The manifest cannot be read."}
        assert read_metrics(running.client)["pairdr_stale_models"] == 1
        assert running.search()["version"].startswith("2-")
        manifest.write_bytes(good)
        wait_until(lambda: "stale" not in running.client.get("/ready").json())
        assert read_metrics(running.client)["pairdr_stale_models"] == 0
