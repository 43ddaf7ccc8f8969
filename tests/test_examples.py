"""The examples run as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from conftest import Parts
from serving import KEY, QUESTION, make_place, run_service

from pairdr.config import ModelConfig
from pairdr.searcher import Searcher

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def langchain() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "langchain_retriever.py"))


def test_langchain_asks_a_service(langchain: dict[str, Any], tmp_path: Path, toy: Path, toy_parts: Parts) -> None:
    place = make_place(tmp_path, toy, toy_parts.encoder)
    with run_service(place, toy_parts.start, keys=[KEY]) as running:
        retriever = langchain["ServiceRetriever"](
            url=running.url, key=KEY, k=3, options={"mode": "dense", "filters": ["kind=river"]}
        )
        found = retriever.invoke(QUESTION)
        hits = running.search(k=3, mode="dense", filters=["kind=river"])["results"][0]["hits"]
    assert [document.id for document in found] == [hit["id"] for hit in hits]
    assert [document.page_content for document in found] == [hit["text"] for hit in hits]
    assert [document.metadata for document in found] == [
        hit["metadata"] | {"title": hit["title"], "score": hit["score"]} for hit in hits
    ]
    assert len(found) == 3


def test_langchain_searches_a_folder(
    langchain: dict[str, Any],
    tmp_path: Path,
    toy: Path,
    toy_parts: Parts,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = make_place(tmp_path, toy, toy_parts.encoder)
    model = ModelConfig(start=str(toy_parts.start), device="cpu")
    searcher = Searcher.open(place, model, words=tmp_path / "bm25")
    found = langchain["FolderRetriever"](searcher=searcher, k=2).invoke(QUESTION)
    assert [(document.id, document.metadata["score"]) for document in found] == [
        (hit.passage_id, hit.score) for hit in searcher.search(QUESTION, k=2)
    ]
    monkeypatch.setattr("pairdr.Searcher.open", lambda folder: searcher)
    langchain["main"](str(place), QUESTION)
    assert capsys.readouterr().out.splitlines()[0].split()[1] == found[0].id
